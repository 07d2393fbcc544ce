package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest"
)

// bytesRead is how much a process has read by system calls so far.
func bytesRead(t *testing.T, pid int) (n int64) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscanf(string(b), "rchar: %d", &n); err != nil {
		t.Fatal(err)
	}
	return n
}

// readBy reads the whole disk and returns how much of it the server had to
// read.
func readBy(t *testing.T, m *mounted) int64 {
	t.Helper()
	pid := serverPID(t, m.dir)
	before := bytesRead(t, pid)
	imgtest.SHA256File(t, m.file())
	return bytesRead(t, pid) - before
}

// TestPassthrough has the kernel read a raw image by itself, and shows by the
// server's own reads when it does and when not.
func TestPassthrough(t *testing.T) {
	imgtest.RequireRoot(t)
	const size = 32 << 20
	dir := workDir(t)
	raw := filepath.Join(dir, "d.raw")
	imgtest.RawFile(t, raw, size, 1<<20, 7)
	if n, err := os.Stat(raw); err != nil || n.Size() != size {
		t.Fatal(n, err)
	}
	want := imgtest.SHA256File(t, raw)
	for _, c := range []struct {
		flags   string
		through bool
	}{
		{"", true}, {"--sandbox=off", true}, {"--passthrough=off", false}, {"-w", false}, {"-w --passthrough=on", true},
		{"--scratch", false}, {"--partitions", true}, {"-o passthrough=off", false},
	} {
		t.Run(c.flags, func(t *testing.T) {
			m := mountImage(t, raw, strings.Fields(c.flags)...)
			if got := imgtest.SHA256File(t, m.file()); got != want {
				t.Errorf("content %s, want %s", got, want)
			}
			m.unmount()
			m = mountImage(t, raw, strings.Fields(c.flags)...) // with a page cache of its own
			if n := readBy(t, m); (n < size/64) != c.through {
				t.Errorf("the server read %d bytes; passthrough %v", n, c.through)
			}
			m.unmount()
		})
	}
}

// TestPassthroughWrites writes through the kernel, to the disk and to a
// partition at once, and finds everything in the image.
func TestPassthroughWrites(t *testing.T) {
	imgtest.RequireRoot(t)
	dir := workDir(t)
	raw := filepath.Join(dir, "d.raw")
	imgtest.RawFile(t, raw, 8<<20, 1<<20, 9)
	imgtest.Require(t, "sfdisk")
	imgtest.Run(t, "sh", "-c", `printf 'label: dos\n2048,8192\n' | sfdisk -q "$1"`, "sh", raw)
	m := mountImage(t, raw, "-w", "--passthrough=on", "--partitions")
	a, b := imgtest.PatternBytes(1, 0, 8192), imgtest.PatternBytes(2, 0, 8192)
	writeRange(t, m.file(), 6<<20, a)
	writeRange(t, filepath.Join(m.dir, "p1"), 4096, b)
	wantBytes(t, "the partition's bytes in the disk", readRange(t, m.file(), 2048*512+4096, len(b)), b)
	m.unmount()
	wantBytes(t, "written to the disk", readRange(t, raw, 6<<20, len(a)), a)
	wantBytes(t, "written to the partition", readRange(t, raw, 2048*512+4096, len(b)), b)
}

// TestPassthroughImpossible: what is no raw file is served, and asking for
// more is an error.
func TestPassthroughImpossible(t *testing.T) {
	imgtest.RequireRoot(t)
	dir := workDir(t)
	image := createQcow2(t, dir, 1<<20, false)
	o := wantExit(t, 1, "mount-image", "--passthrough=on", image, mountPoint(t))
	if !strings.Contains(o.stderr, "--passthrough=auto") {
		t.Errorf("message %q", o.stderr)
	}
	wantExit(t, 2, "mount-image", "-o", "passthrough=maybe", image, mountPoint(t))
	m := mountImage(t, image)
	m.unmount()
}
