package scavenge

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/internal/imgtest/damage"
)

// An error that comes when the new image has its name removes neither it nor
// what had no place in it.
func TestNamed(t *testing.T) {
	was := syncName
	defer func() { syncName = was }()
	syncName = func(string) error { return unix.EIO }
	t.Chdir(t.TempDir())
	p := damage.NewPloop(2, 64<<10, 16, 0, 3)
	p.Append(99) // nobody knows where it belongs
	p.Write(t, "image")
	if _, err := Run(t.Context(), "image", "new", Options{}); !errors.Is(err, unix.EIO) {
		t.Errorf("no error was met: %v", err)
	}
	if names, _ := filepath.Glob("new*"); !slices.Equal(names, []string{"new", "new.lost+found"}) {
		t.Errorf("there is %q", names)
	}
	if _, err := os.Stat("new.lost+found/LIST"); err != nil {
		t.Error(err)
	}
}
