package main

import (
	// The checkers make themselves known.
	_ "github.com/imagestack/imagestack/fsck/ploopfsck"
	_ "github.com/imagestack/imagestack/fsck/qcow2fsck"
)
