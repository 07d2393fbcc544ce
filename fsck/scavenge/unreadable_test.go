package scavenge

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
)

// A header that cannot be read is not one that is lost.
func TestHeaderUnread(t *testing.T) {
	f := backend.NewFault(backend.NewMemBytes("image", make([]byte, 1<<20)))
	if _, err := rebuild(t.Context(), f, "image", "new", Options{}); !errors.Is(err, layers.ErrFormat) {
		t.Fatal(err)
	}
	f.Inject(backend.Rule{On: backend.OpRead})
	if _, err := rebuild(t.Context(), f, "image", "new", Options{}); !errors.Is(err, unix.EIO) || errors.Is(err, layers.ErrFormat) {
		t.Error(err)
	}
}
