package main

import (
	"encoding/binary"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/ploop"
)

// ploopImage makes an image with four mapped clusters of 1 MiB.
func ploopImage(t *testing.T, path string) {
	t.Helper()
	f, err := backend.Open(path, backend.Options{Writable: true, Create: true, Exclusive: true})
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	if err := ploop.Create(ctx, f, ploop.CreateOptions{Size: 16 << 20}); err != nil {
		t.Fatal(err)
	}
	writePloop(t, f, path, 1, 3, 5, 9)
}

// writePloop fills clusters, and closes f.
func writePloop(t *testing.T, f backend.File, path string, clusters ...int64) {
	t.Helper()
	ctx := t.Context()
	img, err := ploop.Open(ctx, f, layers.OpenOptions{Path: path, Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	s, err := layers.NewStack([]layers.Layer{img}, layers.StackOptions{Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range clusters {
		if _, err := s.WriteAt(ctx, imgtest.PatternBytes(7, c<<20, 1<<20), c<<20); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func poke(t *testing.T, path string, off int64, b []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteAt(b, off)
	}
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Damage, -n, -p, -y, undo, as a user goes through them.
func TestFlow(t *testing.T) {
	t.Chdir(t.TempDir())
	ploopImage(t, "a.hds")
	want(t, 0, "-n", "a.hds")
	poke(t, "a.hds", 64+4*2, []byte{0xff, 0xff, 0xff, 0x7f}) // BAT entry 2 far behind the end
	damaged := imgtest.SHA256File(t, "a.hds")
	for _, args := range [][]string{{"a.hds"}, {"-n", "a.hds"}, {"-n", "--json", "a.hds"}} {
		out, _ := want(t, 4, args...)
		if !strings.Contains(out, "ploop.bat.") {
			t.Errorf("%q: %s", args, out)
		}
	}
	if imgtest.SHA256File(t, "a.hds") != damaged {
		t.Error("changed by looking at it")
	}
	out, _ := want(t, 1, "-y", "a.hds")
	if !strings.Contains(out, "FIXED") || !strings.Contains(out, "--undo-apply a.hds.undo a.hds") || !strings.Contains(out, "a.hds: clean") {
		t.Error(out)
	}
	want(t, 0, "-n", "a.hds")
	want(t, 0, "-y", "a.hds")
	want(t, 0, "--undo-apply", "a.hds.undo", "a.hds")
	if imgtest.SHA256File(t, "a.hds") != damaged {
		t.Error("not restored")
	}
	want(t, 0, "--undo-apply", "a.hds.undo", "a.hds")
	poke(t, "a.hds", 100, []byte("x"))
	if _, stderr := want(t, 8, "--undo-apply", "a.hds.undo", "a.hds"); !strings.Contains(stderr, "changed since") {
		t.Error(stderr)
	}
	out, _ = want(t, 0, "--undo-apply", "a.hds.undo", "-f", "--json", "a.hds")
	var doc map[string]any
	if err := json.Unmarshal([]byte(out), &doc); err != nil || doc["restored-bytes"] == nil {
		t.Errorf("%v %s", err, out)
	}
	if imgtest.SHA256File(t, "a.hds") != damaged {
		t.Error("not restored by force")
	}
}

// A lost BAT comes back from a dump; without a dump the data is lost.
func TestDumpRestore(t *testing.T) {
	t.Chdir(t.TempDir())
	ploopImage(t, "a.hds")
	want(t, 0, "--dump", "a.dump", "a.hds")
	if st, err := os.Stat("a.dump"); err != nil || st.Size() > 4096 || st.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", st, err)
	}
	good := imgtest.SHA256File(t, "a.hds")
	want(t, 0, "--dump", "a.dump", "a.hds") // replaces the old one
	ploopImage(t, "other.hds")
	dumped := imgtest.SHA256File(t, "a.dump")
	if _, stderr := want(t, 8, "--dump", "a.dump", "other.hds"); !strings.Contains(stderr, "remove it first") || imgtest.SHA256File(t, "a.dump") != dumped {
		t.Errorf("the only dump of another image is replaced: %s", stderr)
	}
	if _, stderr := want(t, 8, "--restore", "a.dump", "-y", "a.hds"); !strings.Contains(stderr, "is clean") {
		t.Error(stderr)
	}
	for name, damage := range map[string]func(){
		"header": func() { poke(t, "a.hds", 0, make([]byte, 64)) },
		"BAT":    func() { poke(t, "a.hds", 64, []byte(strings.Repeat("\xff", 64))) },
		"both":   func() { poke(t, "a.hds", 0, make([]byte, 4096)) },
	} {
		damage()
		bad := imgtest.SHA256File(t, "a.hds")
		if bad == good {
			t.Fatal(name)
		}
		code := exitOf(t, "--format", "ploop", "--dump", "b.dump", "a.hds")
		if _, err := os.Stat("b.dump"); code != 4 && code != 8 || err == nil {
			t.Errorf("%s: dumped although damaged: exit %d", name, code)
		}
		want(t, 4, "--restore", "a.dump", "a.hds")
		want(t, 4, "--restore", "a.dump", "-n", "--json", "a.hds")
		if imgtest.SHA256File(t, "a.hds") != bad {
			t.Errorf("%s: changed without -y", name)
		}
		out, _ := want(t, 1, "--restore", "a.dump", "-y", "--undo", name+".undo", "a.hds")
		if imgtest.SHA256File(t, "a.hds") != good {
			t.Errorf("%s: not as it was: %s", name, out)
		}
		want(t, 0, "--undo-apply", name+".undo", "a.hds")
		if imgtest.SHA256File(t, "a.hds") != bad {
			t.Errorf("%s: not taken back", name)
		}
		want(t, 0, "--undo-apply", name+".undo", "a.hds")
		want(t, 1, "--restore", "a.dump", "-y", "--undo", name+".undo2", "a.hds")
	}
	// A dump of another disk, a damaged dump, a file cut short.
	ploopImage(t, "b.hds")
	f, err := os.OpenFile("c.hds", os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	poke(t, "a.hds", 64, []byte(strings.Repeat("\xff", 64)))
	b, err := os.ReadFile("a.dump")
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(b); i += 7 {
		c := append([]byte(nil), b...)
		c[i] ^= 0x10
		if err := os.WriteFile("bad.dump", c, 0o600); err != nil {
			t.Fatal(err)
		}
		before := imgtest.SHA256File(t, "a.hds")
		code := exitOf(t, "--restore", "bad.dump", "-y", "a.hds")
		if code == 1 { // the damage was in a part that nobody looks at
			want(t, 0, "-n", "a.hds")
			poke(t, "a.hds", 64, []byte(strings.Repeat("\xff", 64)))
		} else if imgtest.SHA256File(t, "a.hds") != before {
			t.Errorf("byte %d: exit %d, but changed", i, code)
		}
	}
	want(t, 8, "--restore", "a.dump", "-y", "c.hds")
	if err := os.Truncate("b.hds", 2<<20); err != nil {
		t.Fatal(err)
	}
	want(t, 8, "--restore", "a.dump", "-y", "b.hds")
}

// What was written after the dump survives when only the roots are lost, and
// a dump that would damage the image is refused.
func TestDumpOld(t *testing.T) {
	t.Chdir(t.TempDir())
	ploopImage(t, "a.hds")
	want(t, 0, "--dump", "a.dump", "a.hds")
	f, err := backend.Open("a.hds", backend.Options{Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	writePloop(t, f, "a.hds", 2, 12)
	poke(t, "a.hds", 64+4*14, []byte{0xff, 0xff, 0xff, 0x7f})
	// Two clusters that the dump does not know become leaks.
	out, _ := want(t, 5, "--restore", "a.dump", "-y", "a.hds")
	if !strings.Contains(out, "2097152 bytes behind") {
		t.Error(out)
	}
	want(t, 4, "-n", "a.hds")
	want(t, 1, "-p", "a.hds")
}

func TestDumpJSON(t *testing.T) {
	t.Chdir(t.TempDir())
	ploopImage(t, "a.hds")
	out, _ := want(t, 0, "--dump-json", "a.hds")
	var doc struct {
		Identity struct{ Format string }
		Info     layers.Info
		Metadata []struct {
			Offset, Length int64
			Role           string
		}
		Map []struct {
			Guest, Length, Host int64
			Kind                string
		}
	}
	if err := json.Unmarshal([]byte(out), &doc); err != nil {
		t.Fatal(err)
	}
	if doc.Identity.Format != "ploop" || len(doc.Metadata) < 2 || doc.Metadata[0].Role != "header" || doc.Info.UsedClusters != 4 {
		t.Errorf("%+v", doc)
	}
	if len(doc.Map) != 4 || doc.Map[0].Guest != 1<<20 || doc.Map[0].Length != 1<<20 || doc.Map[0].Kind != "data" {
		t.Errorf("%+v", doc.Map)
	}
	b, err := os.ReadFile("a.hds")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range doc.Map {
		if string(b[e.Host:e.Host+e.Length]) != string(imgtest.PatternBytes(7, e.Guest, int(e.Length))) {
			t.Errorf("%+v leads to something else", e)
		}
	}
	if left, _ := filepath.Glob("*"); len(left) != 1 {
		t.Errorf("%q", left)
	}
}

// A qcow2 image whose L1 table is lost comes back with what was written after
// the dump; one that lost everything comes back as it was then.
func TestDumpQcow2(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	t.Chdir(t.TempDir())
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "a.qcow2", "8M")
	imgtest.QemuIO(t, "qcow2", "a.qcow2", "write -P 7 0 1M", "write -P 9 5M 64k")
	imgtest.QemuImg(t, "snapshot", "-c", "s", "a.qcow2")
	imgtest.QemuIO(t, "qcow2", "a.qcow2", "write -P 8 512k 64k")
	want(t, 0, "--dump", "a.dump", "a.qcow2")
	l1 := func() int64 {
		b, err := os.ReadFile("a.qcow2")
		if err != nil {
			t.Fatal(err)
		}
		return int64(binary.BigEndian.Uint64(b[40:]))
	}()
	// In a place that the L2 tables of the dump cover.
	imgtest.QemuIO(t, "qcow2", "a.qcow2", "write -P 6 1M 64k")
	imgtest.QemuRaw(t, "qcow2", "a.qcow2", "before.raw")
	poke(t, "a.qcow2", l1, make([]byte, 32))
	want(t, 4, "-n", "a.qcow2")
	out, _ := want(t, 1, "--restore", "a.dump", "-y", "a.qcow2")
	if !strings.Contains(out, "the roots") {
		t.Error(out)
	}
	imgtest.QemuRaw(t, "qcow2", "a.qcow2", "after.raw")
	imgtest.SameContent(t, "before.raw", "after.raw")
	want(t, 0, "-n", "a.qcow2")
	// Header, tables and counts of the first 256 KiB, but not the L2 tables.
	poke(t, "a.qcow2", 0, make([]byte, 3*4096))
	want(t, 8, "-n", "a.qcow2")
	want(t, 4, "-n", "--format", "qcow2", "a.qcow2")
	want(t, 1, "--restore", "a.dump", "-y", "a.qcow2")
	if exit, out := imgtest.QemuCheck(t, "a.qcow2", "qcow2"); exit != 0 && exit != 3 {
		t.Errorf("qemu-img check: %d %s", exit, out)
	}
	imgtest.QemuIO(t, "qcow2", "a.qcow2", "read -P 7 0 512k", "read -P 8 512k 64k", "read -P 9 5M 64k")
}

// QEMU and we keep out of each other's images.
func TestInUse(t *testing.T) {
	imgtest.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "a.qcow2", "1M")
	f, err := backend.Open("a.qcow2", backend.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := backend.LockerOf(f).Lock(backend.WriterUse, backend.WriterUnshare); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"-n", "a.qcow2"}, {"-y", "a.qcow2"}, {"--dump", "x", "a.qcow2"}, {"--json", "a.qcow2"}} {
		if _, stderr := want(t, 8, args...); !strings.Contains(stderr, "in use") || !strings.Contains(stderr, "fuser") && !strings.Contains(stderr, "--force-share") {
			t.Errorf("%q: %q", args, stderr)
		}
	}
	want(t, 1, "--compat=qemu", "a.qcow2")
}

// A cluster that two places of the disk claim goes to the one that the guest
// uses: what the guest has freed does not get a copy. Where the guest cannot
// tell, both keep the content.
func TestGuestEvidence(t *testing.T) {
	imgtest.Require(t, "qemu-img", "mkfs.ext4")
	const unmapped = 30 << 20
	for name, c := range map[string]struct {
		fill func()
		same bool
	}{
		"ext4": {func() { imgtest.Run(t, "mkfs.ext4", "-q", "-F", "d.raw") }, true},
		"unknown": {func() {
			poke(t, "d.raw", 0, imgtest.PatternBytes(3, 0, 128<<10))
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Chdir(t.TempDir())
			imgtest.Run(t, "truncate", "-s", "40M", "d.raw")
			c.fill()
			imgtest.QemuImg(t, "convert", "-f", "raw", "-O", "qcow2", "d.raw", "a.qcow2")
			b, err := os.ReadFile("a.qcow2")
			if err != nil {
				t.Fatal(err)
			}
			l1 := binary.BigEndian.Uint64(b[40:])
			l2 := binary.BigEndian.Uint64(b[l1:]) & 0x00fffffffffffe00
			entry := l2 + 8*(unmapped>>16)
			if binary.BigEndian.Uint64(b[entry:]) != 0 || binary.BigEndian.Uint64(b[l2:]) == 0 {
				t.Fatal("the image is not as expected")
			}
			poke(t, "a.qcow2", int64(entry), b[l2:l2+8])
			want(t, 1, "-y", "a.qcow2")
			exit, out := imgtest.Try(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", "d.raw", "a.qcow2")
			if (exit == 0) != c.same {
				t.Errorf("compare: %d %s", exit, out)
			}
			want(t, 0, "-n", "a.qcow2")
			if exit, out := imgtest.QemuCheck(t, "a.qcow2", "qcow2"); exit != 0 {
				t.Error(out)
			}
		})
	}
}
