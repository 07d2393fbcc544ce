package backend_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

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

// Asking for the length leaves the times of a file alone: after an fstat(2) the
// kernel has to give the next write a time of its own (multigrain timestamps,
// Linux 6.13), and every fdatasync(2) would write the inode besides the data.
// Where nobody has asked, writes of one tick of the clock share its time.
func TestWriteAsksForNoTime(t *testing.T) {
	dir := t.TempDir()
	plain, err := os.Create(filepath.Join(dir, "plain"))
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	path := filepath.Join(dir, "ours")
	if err := os.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	ours, err := backend.Open(path, backend.Options{Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	b := make([]byte, 512)
	write := func() {
		if _, err := plain.WriteAt(b, 0); err != nil {
			t.Fatal(err)
		}
		for range 2 { // a tick's first write has the time of the tick in any case
			if _, err := ours.WriteAt(b, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	var a, o time.Time
	for range 50 {
		write()                           // after the questions below, each with a time of its own
		time.Sleep(20 * time.Millisecond) // to the next tick
		write()
		sa, err1 := plain.Stat()
		so, err2 := os.Stat(path)
		if err := errors.Join(err1, err2); err != nil {
			t.Fatal(err)
		}
		if a, o = sa.ModTime(), so.ModTime(); a.Equal(o) {
			return // else a tick may have come between the two
		}
	}
	t.Errorf("a plain write at %v, ours at %v: they never share a tick", a, o)
}
