package backend

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// A file that is read without leaving anything in the page cache shows the
// same bytes and the same ends, and its pages are not there afterwards; without
// DontCache they are (the negative control).
func TestDontCache(t *testing.T) {
	dir, err := os.MkdirTemp("/var/tmp", "dontcache-") // on a disk, unlike perhaps /tmp
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "f")
	content := bytes.Repeat([]byte("page cache "), 200<<10)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, dontCache := range []bool{false, true} {
		f, err := Open(path, Options{Writable: true})
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		err = WithDescriptor(f, func(fd int) error { return unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED) })
		if err != nil {
			t.Fatal(err)
		}
		page := make([]byte, 4096)
		if n := inCache(t, f); n > 0 {
			t.Fatalf("%d pages were not dropped", n)
		}
		if dontCache {
			DontCache(f)
		}
		got := make([]byte, len(content)+1)
		for off := 0; off < len(got); off += 64 << 10 {
			want := min(64<<10, len(content)-off)
			if ReadCached(f, page, int64(min(off, len(content)-4096))) && !bytes.Equal(page, content[min(off, len(content)-4096):][:4096]) {
				t.Fatal("other bytes")
			}
			n, err := f.ReadAt(got[off:min(off+64<<10, len(got))], int64(off))
			if n != want || err != nil && (err != io.EOF || want == 64<<10) {
				t.Fatalf("at %d: %d bytes and %v, want %d", off, n, err, want)
			}
		}
		if n, err := f.ReadAt(page, int64(len(content))-5); n != 5 || err != io.EOF {
			t.Fatalf("at the end: %d bytes and %v, want 5 and EOF", n, err)
		}
		if !bytes.Equal(got[:len(content)], content) {
			t.Fatal("other bytes")
		}
		if n, err := f.ReadAt(got[:5], 7); n != 5 || err != nil || !bytes.Equal(got[:5], content[7:12]) {
			t.Fatalf("%d bytes %q and %v", n, got[:5], err)
		}
		if _, err := f.ReadAt(page, -1); err == nil {
			t.Error("a read before the beginning")
		}
		if o := f.(*osFile); dontCache && !o.transient.Load() {
			t.Log("this filesystem has no RWF_DONTCACHE: reads go on as they always do")
			continue
		}
		cached := inCache(t, f)
		if pages := len(content) / 4096; dontCache && cached > pages/10 || !dontCache && cached < pages*9/10 {
			t.Errorf("DontCache %v: %d of %d pages are in the page cache afterwards", dontCache, cached, pages)
		}
	}
}

// inCache counts the pages of f in the page cache. (Trying to read them would
// start reading ahead.)
func inCache(t *testing.T, f File) int {
	t.Helper()
	var c unix.Cachestat_t
	err := WithDescriptor(f, func(fd int) error { return unix.Cachestat(uint(fd), &unix.CachestatRange{}, &c, 0) })
	if err != nil {
		t.Fatal(err)
	}
	return int(c.Cache)
}
