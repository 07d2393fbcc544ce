package ntfs

import (
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest/guesttest"
)

// FuzzNTFS changes everything that is read of a small filesystem.
func FuzzNTFS(f *testing.F) {
	guesttest.Require(f, "mkntfs", "ntfs-3g")
	guesttest.Edits(f, aged(f), Free, nil, nil)
}
