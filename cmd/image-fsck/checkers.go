package main

import (
	// The checkers make themselves known.
	_ "github.com/imagestack/imagestack/fsck/ploopfsck"
)
