package guestfs_test

import (
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/imagestack/imagestack/guestfs"
	"github.com/imagestack/imagestack/internal/imgtest/hostile"
	"github.com/imagestack/imagestack/layers/open"
)

// What a look at a hostile guest may cost.
const (
	mostTime   = 5 * time.Second
	mostMemory = 64 << 20 // bytes allocated, also those that were given back
)

func judgeCase(t *testing.T, c hostile.Case) *guestfs.Report {
	t.Helper()
	dirs, err := c.Prepare(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	o := open.Options{CacheSize: 1 << 20}
	if c.Class == hostile.Disk {
		o.Format = "raw"
	}
	s, err := open.Open(t.Context(), filepath.Join(dirs.In, c.Image), o)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	begun := time.Now()
	rep, err := guestfs.Free(t.Context(), s.ReaderAt(t.Context()), s.Size(), guestfs.Options{Gaps: true, Swap: true})
	if err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if d := time.Since(begun); d > mostTime {
		t.Errorf("it takes %v", d)
	}
	if n := after.TotalAlloc - before.TotalAlloc; n > mostMemory {
		t.Errorf("%d bytes are allocated", n)
	}
	return rep
}

// Nothing of a filesystem that lies, and of a disk whose partition table does,
// is called free: doubt means that all is in use.
func TestHostile(t *testing.T) {
	n := 0
	for _, c := range hostile.Cases() {
		if c.Class != hostile.Guest && (c.Class != hostile.Disk || c.By[hostile.Partitions] == 0) {
			continue
		}
		n++
		t.Run(c.Name, func(t *testing.T) {
			if rep := judgeCase(t, c); rep.Bytes() != 0 {
				t.Errorf("%d bytes are called free: %+v", rep.Bytes(), rep.Areas)
			}
		})
	}
	t.Logf("%d disks", n)
	// The same filesystems, when they do not lie, are judged.
	for _, c := range hostile.Sound() {
		if rep := judgeCase(t, c); rep.Bytes() == 0 {
			t.Errorf("%s: nothing is free: %+v", c.Name, rep.Areas)
		}
	}
}
