package fat

import (
	"os"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/guesttest"
)

func fuzz(f *testing.F, size int64, args string) {
	imgtest.Require(f, "mkfs.fat", "mcopy")
	path := mkfs(f, size, args)
	age(f, path, 1, 5000)
	b, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	guesttest.Edits(f, b, Free, nil, nil)
}

// FuzzFAT12 changes boot sector, table and directories.
func FuzzFAT12(f *testing.F) { fuzz(f, 1440<<10, "-F 12 -f 1") }

// FuzzFAT32 is FuzzFAT12 with entries of 32 bits.
func FuzzFAT32(f *testing.F) { fuzz(f, 36<<20, "-F 32 -s 1 -f 1") }
