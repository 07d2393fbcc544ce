package imgtest

import (
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// ploopPad cures a crash of Debian's binary: it copies about 4 KiB beginning
// at a string of its argument vector, and reads past the end of the stack when
// the environment behind it is shorter than that.
var ploopPad = "PLOOP_PAD=" + strings.Repeat("0", 8000)

// ploopScript cures its refusal of version 2 images without the kernel driver:
// it looks for a module parameter, which is faked where only it can see it.
const ploopScript = `mount -t tmpfs none /sys/module &&
mkdir -p /sys/module/ploop/parameters &&
echo 1 >/sys/module/ploop/parameters/large_disk_support || exit 120
exec ploop "$@"`

// RequirePloop needs Debian's ploop tool and a private mount namespace to run
// it in.
func RequirePloop(t testing.TB) {
	t.Helper()
	Require(t, "ploop", "unshare", "mount")
	if r := start(t, nil, "unshare", unshareArgs("mount -t tmpfs none /sys/module")...); r.exit != 0 {
		missing(t, "needs a mount namespace for ploop: %s", strings.TrimSpace(r.all()))
	}
}

func unshareArgs(script string, args ...string) []string {
	flags := "-m"
	if os.Geteuid() != 0 {
		flags = "-rm"
	}
	return append([]string{flags, "sh", "-c", script, "ploop"}, args...)
}

// Ploop runs Debian's ploop tool, on a kernel without the ploop driver, and
// returns its exit status and everything that it printed.
//
// Its check looks at the host file's extents on ext4, so images that it shall
// judge must not lie on tmpfs.
func Ploop(t testing.TB, args ...string) (exit int, out string) {
	t.Helper()
	RequirePloop(t)
	r := start(t, []string{ploopPad, "PATH=" + os.Getenv("PATH") + ":" + strings.Join(sbin, ":")},
		"unshare", unshareArgs(ploopScript, args...)...)
	if r.exit == 120 {
		t.Fatalf("ploop: cannot fake the module parameter: %s", r.all())
	}
	return r.exit, r.all()
}

// PloopRun is Ploop that fails the test unless the tool exits 0.
func PloopRun(t testing.TB, args ...string) string {
	t.Helper()
	exit, out := Ploop(t, args...)
	if exit != 0 {
		t.Fatalf("ploop %s: exit %d\n%s", strings.Join(args, " "), exit, out)
	}
	return out
}

// PloopCheck runs ploop check -f -c on one image: full scan, duplicates and
// unreferenced clusters included. It may repair what it finds, so check a copy
// when the image matters afterwards. 0 is clean or repaired; 11 format, 37 in
// use; unreferenced clusters are only reported ("Hole at block N", exit 0).
func PloopCheck(t testing.TB, path string) (exit int, out string) {
	t.Helper()
	return Ploop(t, "check", "-f", "-c", path)
}

// PloopBundle makes a bundle with ploop's own tool: DiskDescriptor.xml and
// deltas images in dir, the lowest of mode raw, expanded or preallocated, the
// others snapshots, all of the format version given and of 1 MiB clusters. It
// returns the images, top first. Nothing is written into them.
func PloopBundle(t testing.TB, dir, mode string, version int, size int64, deltas int) []Image {
	t.Helper()
	base := filepath.Join(dir, "root.hds")
	PloopRun(t, "init", "-s", strconv.FormatInt(size>>10, 10)+"K", "-f", mode, "-v", strconv.Itoa(version), "-t", "none", base)
	format := "parallels"
	if mode == "raw" {
		format = "raw"
	}
	images := []Image{{base, format}}
	xml := filepath.Join(dir, "DiskDescriptor.xml")
	known := map[string]bool{base: true}
	for len(images) < deltas {
		PloopRun(t, "snapshot", xml)
		found, err := filepath.Glob(base + "*")
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range found {
			if !known[p] {
				known[p] = true
				images = append([]Image{{p, "parallels"}}, images...)
			}
		}
	}
	return images
}

// PloopChain is the chain of a bundle's current top as ploop's own tool sees
// it, top first. Formats are told by signature: with a raw base ploop calls
// every image of the bundle Plain.
func PloopChain(t testing.TB, xml string) []Image {
	t.Helper()
	type shot struct{ parent, file string }
	shots, top := map[string]shot{}, ""
	for line := range strings.Lines(PloopRun(t, "snapshot-list", "-H", "-o", "parent_uuid,uuid,current,fname", xml)) {
		f := strings.Fields(line)
		switch {
		case len(f) == 3:
			shots[f[1]] = shot{f[0], f[2]}
		case len(f) == 4 && f[2] == "*":
			shots[f[1]] = shot{f[0], f[3]}
			top = f[1]
		default:
			t.Fatalf("ploop snapshot-list: cannot read %q", line)
		}
	}
	var images []Image
	for id := top; shots[id].file != ""; id = shots[id].parent {
		images = append(images, Image{shots[id].file, signatureFormat(t, shots[id].file)})
		if len(images) > len(shots) {
			t.Fatalf("ploop snapshot-list: a loop of parents in %s", xml)
		}
	}
	return images
}

func signatureFormat(t testing.TB, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }() // read only
	var sig [16]byte
	if _, err := io.ReadFull(f, sig[:]); err != nil {
		t.Fatal(err)
	}
	switch string(sig[:]) {
	case "WithoutFreeSpace", "WithouFreSpacExt":
		return "parallels"
	}
	return "raw"
}
