package faultfs_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/faultfs"
)

// A program gets exactly the failures that were ordered, and each of its calls
// is seen.
func TestFaults(t *testing.T) {
	imgtest.RequireRoot(t)
	imgtest.RequireFuse(t)
	below, dir := t.TempDir(), t.TempDir()
	f, err := faultfs.Mount(below, dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := f.Unmount(); err != nil {
			t.Error(err)
		}
	}()
	path := filepath.Join(dir, "file")
	sh := func(script string) (int, string) {
		t.Helper()
		cmd := exec.Command("sh", "-c", script, "sh", path)
		out, _ := cmd.CombinedOutput() // the exit code is looked at
		return cmd.ProcessState.ExitCode(), string(out)
	}
	var mu sync.Mutex // also of what is looked at when the program has ended
	var seen []faultfs.Op
	f.Set(func(o faultfs.Op) faultfs.Verdict {
		mu.Lock()
		defer mu.Unlock()
		seen = append(seen, o)
		return faultfs.Verdict{}
	})
	if exit, out := sh(`printf 0123456789 > "$1" && sync "$1" && cat "$1" && mv "$1" "$1.new" && rm "$1.new"`); exit != 0 || out != "0123456789" {
		t.Fatalf("without faults: exit %d, %q", exit, out)
	}
	mu.Lock()
	var kinds []string
	for _, o := range seen {
		kinds = append(kinds, string(o.Kind))
	}
	mu.Unlock()
	if got := strings.Join(kinds, " "); !strings.HasPrefix(got, "create write ") || !strings.Contains(got, "sync") || !strings.HasSuffix(got, "rename remove") {
		t.Errorf("seen: %s", got)
	}
	at := func(k faultfs.Kind, v faultfs.Verdict) {
		done := false
		f.Set(func(o faultfs.Op) faultfs.Verdict {
			mu.Lock()
			defer mu.Unlock()
			if o.Kind != k || done {
				return faultfs.Verdict{}
			}
			done = true
			return v
		})
	}
	at(faultfs.Write, faultfs.Verdict{Err: unix.ENOSPC, Short: true})
	if exit, out := sh(`printf 0123456789 | dd of="$1" status=none`); exit == 0 || !strings.Contains(out, "No space") {
		t.Errorf("ENOSPC: exit %d, %q", exit, out)
	}
	if b, err := os.ReadFile(filepath.Join(below, "file")); string(b) != "01234" {
		t.Errorf("half of a write: %q, %v", b, err)
	}
	at(faultfs.Read, faultfs.Verdict{Short: true})
	if exit, out := sh(`dd if="$1" bs=4 count=1 status=none`); exit != 0 || out != "01" {
		t.Errorf("half of a read: exit %d, %q", exit, out)
	}
	at(faultfs.Sync, faultfs.Verdict{Err: unix.EIO})
	if exit, _ := sh(`sync "$1"`); exit == 0 {
		t.Error("a failed sync goes unnoticed")
	}
	at(faultfs.SyncDir, faultfs.Verdict{Err: unix.EIO})
	if exit, _ := sh(`sync "${1%/*}"`); exit == 0 {
		t.Error("a failed sync of a directory goes unnoticed")
	}
	if exit, out := sh(`ls "${1%/*}" && sync "${1%/*}"`); exit != 0 || out != "file\n" {
		t.Errorf("the directory: exit %d, %q", exit, out)
	}
	f.Track(true)
	at(faultfs.Sync, faultfs.Verdict{Err: unix.EIO, Lose: true})
	if exit, _ := sh(`printf ab | dd of="$1" conv=notrunc status=none && sync "$1"`); exit == 0 {
		t.Error("a failed sync goes unnoticed")
	}
	if b, err := os.ReadFile(filepath.Join(below, "file")); string(b) != "01234" {
		t.Errorf("after a sync that lost what was written: %q, %v", b, err)
	}
	f.Track(false)
	at(faultfs.Read, faultfs.Verdict{Kill: true})
	if exit, out := sh(`cat "$1"; echo $?`); exit != 0 || !strings.Contains(out, "137") {
		t.Errorf("killed: %d, %q", exit, out)
	}
	f.Set(nil)
	if exit, out := sh(`cat "$1"`); exit != 0 || !bytes.Equal([]byte(out), []byte("01234")) {
		t.Errorf("afterwards: exit %d, %q", exit, out)
	}
}
