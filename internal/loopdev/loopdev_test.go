package loopdev

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/internal/imgtest"
)

func file(t *testing.T, dir, name string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Many at once each get a device of their own.
func TestRace(t *testing.T) {
	imgtest.RequireLoop(t)
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	const n = 12
	names := make([]string, n)
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		path := file(t, dir, "f"+string(rune('a'+i)))
		wg.Go(func() { names[i], errs[i] = Attach(path, Options{ReadOnly: i%2 == 0}) })
	}
	wg.Wait()
	seen := make(map[string]bool)
	for i, name := range names {
		if errs[i] != nil {
			t.Errorf("%d: %v", i, errs[i])
			continue
		}
		if seen[name] {
			t.Errorf("%s twice", name)
		}
		seen[name] = true
		backing, err := os.ReadFile(sysBlock + "/" + filepath.Base(name) + "/loop/backing_file")
		if want := filepath.Join(dir, "f"+string(rune('a'+i))); err != nil || strings.TrimSpace(string(backing)) != want {
			t.Errorf("%s: %q %v, want %q", name, backing, err, want)
		}
	}
	under, err := Under(dir)
	if err != nil || len(under) != len(seen) {
		t.Errorf("under %s: %q %v", dir, under, err)
	}
	for name := range seen {
		if err := Detach(name, false); err != nil {
			t.Error(err)
		}
	}
	if under, err := Under(dir); err != nil || len(under) != 0 {
		t.Errorf("left: %q %v", under, err)
	}
}

func TestBusy(t *testing.T) {
	imgtest.RequireLoop(t)
	imgtest.Require(t, "mkfs.ext4", "mkswap")
	dir := t.TempDir()
	name, err := Attach(file(t, dir, "disk"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	attached := true
	defer func() {
		if attached {
			_ = Detach(name, true)
		}
	}()
	imgtest.Run(t, "mkfs.ext4", "-q", name)
	imgtest.Run(t, "mount", name, dir)
	users := Users(name)
	err = Detach(name, false)
	imgtest.Umount(t, dir)
	if !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), "mounted on "+dir) {
		t.Errorf("mounted: %v (%q)", err, users)
	}
	if err := Detach(name, false); err != nil {
		t.Error(err)
	} else {
		attached = false
	}
	if err := Detach(name, false); err != nil {
		t.Errorf("detaching twice: %v", err)
	}
}

func TestRefused(t *testing.T) {
	imgtest.RequireLoop(t)
	if _, err := Attach(filepath.Join(t.TempDir(), "none"), Options{}); !errors.Is(err, unix.ENOENT) {
		t.Errorf("no such file: %v", err)
	}
	if name, err := Attach(file(t, t.TempDir(), "x"), Options{SectorSize: 1000}); err == nil {
		t.Error("sector size 1000 accepted")
		_ = Detach(name, true)
	}
}
