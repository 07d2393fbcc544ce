package backend_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/backend"
)

// A file that somebody else cuts off is not written to any more: the write
// would make it long again, with a hole in place of what was there.
func TestShrunk(t *testing.T) {
	for _, how := range []string{"write", "vector", "copy", "sync"} {
		t.Run(how, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "file")
			if err := os.WriteFile(path, make([]byte, 8192), 0o600); err != nil {
				t.Fatal(err)
			}
			f, err := backend.Open(path, backend.Options{Writable: true})
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			b := make([]byte, 512)
			do := map[string]func() error{
				"write":  func() error { _, err := f.WriteAt(b, 8192); return err },
				"vector": func() error { _, err := f.WritevAt([][]byte{b, b}, 8192); return err },
				"copy":   func() error { _, err := f.CopyRange(backend.NewMemBytes("m", b), 0, 8192, 512); return err },
				"sync":   f.Sync,
			}
			// Our own changes of the length are none of that.
			for _, change := range []func() error{do["write"], do["sync"], func() error { return f.Truncate(4096) }, do["write"], do["vector"], do["copy"],
				func() error { return f.Truncate(100 << 10) }, do["write"], do["sync"]} {
				if err := change(); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.Truncate(path, 1000); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if err := do[how](); !errors.Is(err, backend.ErrShrunk) || !errors.Is(err, unix.EIO) {
					t.Errorf("%v, want ErrShrunk", err)
				}
			}
			if st, err := os.Stat(path); err != nil || st.Size() != 1000 {
				t.Errorf("%v, %v: it was made longer", st.Size(), err)
			}
			// Not even when it is as long as before.
			if err := os.Truncate(path, 100<<10); err != nil {
				t.Fatal(err)
			}
			if err := f.Sync(); !errors.Is(err, backend.ErrShrunk) {
				t.Errorf("later: %v, want ErrShrunk", err)
			}
		})
	}
}
