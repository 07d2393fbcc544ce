package e2e

import (
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/imagestack/imagestack/internal/imgtest"
)

// overURing reports whether the server of the mount has rings.
func overURing(t *testing.T, m *mounted) bool {
	t.Helper()
	return len(ringsOf(t, serverPID(t, m.dir))) > 0
}

// TestDiskModelOverURing is TestDiskModel with the requests over io_uring,
// isolated as usual and not.
func TestDiskModelOverURing(t *testing.T) {
	imgtest.RequireURing(t)
	imgtest.Require(t, "qemu-img")
	const size = 24 << 20
	for _, sandbox := range []string{"--sandbox=require", "--sandbox=off"} {
		for _, f := range formats {
			t.Run(f.name+sandbox, func(t *testing.T) {
				image := f.create(t, workDir(t), size, true)
				seed := uint64(time.Now().UnixNano())
				t.Logf("seed %d", seed)
				d := &diskModel{
					rng: rand.New(rand.NewPCG(seed, 0)), want: make([]byte, size), flags: []string{"--transport=uring", sandbox},
				}
				d.run(t, image, 300)
				f.check(t, image, false)
			})
		}
	}
}

// TestURing: over io_uring where it is switched on, unless told otherwise; a
// guest lives through it, a killed server leaves what was synced, and can be
// unmounted.
func TestURing(t *testing.T) {
	imgtest.RequireURing(t)
	image := createQcow2(t, workDir(t), 64<<20, true)
	for flag, want := range map[string]bool{
		"--transport=auto": true, "--transport=dev": false, "--transport=uring": true, "-o transport=dev": false,
	} {
		m := mountImage(t, image, strings.Fields(flag)...)
		if got := overURing(t, m); got != want {
			t.Errorf("%s: over io_uring: %v", flag, got)
		}
		m.unmount()
	}

	m := mountImage(t, image, "--transport=uring", "-w", "--loop")
	imgtest.Run(t, "mkfs.ext4", "-q", m.loop)
	dir, umount := mountGuest(t, m.loop, "discard")
	imgtest.Run(t, "cp", "-a", "/etc", dir)
	umount()
	imgtest.Run(t, "e2fsck", "-fn", m.loop)
	m.unmount()
	checkQcow2(t, image, false)

	m = serveImage(t, image, "--transport=uring", "-w")
	p := imgtest.PatternBytes(1, 0, 1<<20)
	writeRange(t, m.file(), 32<<20, p)
	m.kill()
	wantExit(t, 0, "mount-image", "-u", m.dir)
	m = mountImage(t, image, "--transport=uring")
	wantBytes(t, "synced before the kill", readRange(t, m.file(), 32<<20, len(p)), p)
	m.unmount()
}

// TestURingSwitchedOff: asking for it is then an error with the way out.
func TestURingSwitchedOff(t *testing.T) {
	imgtest.RequireURing(t)
	image := createQcow2(t, workDir(t), 1<<20, false)
	if err := os.WriteFile("/sys/module/fuse/parameters/enable_uring", []byte("N"), 0); err != nil {
		t.Fatal(err)
	}
	o := wantExit(t, 1, "mount-image", "--transport=uring", image, mountPoint(t))
	if !strings.Contains(o.stderr, "enable_uring") || !strings.Contains(o.stderr, "--transport=auto") {
		t.Errorf("message %q", o.stderr)
	}
	m := mountImage(t, image)
	if overURing(t, m) {
		t.Error("over io_uring all the same")
	}
	m.unmount()
	wantExit(t, 2, "mount-image", "--transport=pigeon", image, mountPoint(t))
}
