package ploopfsck_test

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/damage"
)

// TestUnwritten: a cluster that the host has reserved and nobody has written is
// a hole for ploop, which asks FIEMAP; the repair writes zeros there, and then
// ploop has nothing to say.
func TestUnwritten(t *testing.T) {
	imgtest.RequirePloop(t)
	const k = 64 << 10
	p := damage.NewPloop(2, k, 16, 0, 3)
	p.SetEntry(5, len(p.B)/k)
	path := filepath.Join(t.TempDir(), "image.hds")
	p.Write(t, path)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	err = unix.Fallocate(int(f.Fd()), 0, int64(len(p.B)), k)
	imgtest.RequireReserve(t, err)
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		t.Fatal(err)
	}
	if r := check(t, path); !has(r, "ploop.host.hole") {
		show(t, "check", r)
		t.Error("not found")
	}
	// ploop's check looks for them on ext4 only.
	before, _ := imgtest.PloopCheck(t, path)
	res, _, _ := repair(t, checker, openFile(t, path, true), fsck.DecidePreen, fsck.Options{})
	if res.Left.Worst() > fsck.Note || has(res.Left, "ploop.host.hole") {
		show(t, "left", res.Left)
		t.Error("not repaired")
	}
	if exit, out := imgtest.PloopCheck(t, path); exit != 0 {
		t.Errorf("ploop check: %d before, %d after: %s", before, exit, out)
	}
}

// TestFarBehind: entries of guest clusters behind 2 TiB are judged as all
// others are; ploop's own check computes their place in 32 bits.
func TestFarBehind(t *testing.T) {
	const cluster, entries = 64 << 20, 3 << 40 / (64 << 20)
	le := binary.LittleEndian
	head := make([]byte, 64+4*(entries+2))
	copy(head, "WithouFreSpacExt")
	le.PutUint32(head[16:], 2)
	le.PutUint32(head[20:], 16)
	le.PutUint32(head[24:], entries*(cluster/512)/512)
	le.PutUint32(head[28:], cluster/512)
	le.PutUint32(head[32:], entries)
	le.PutUint64(head[36:], entries*(cluster/512))
	le.PutUint32(head[48:], cluster/512)
	put := func(idx int, slot uint32) { le.PutUint32(head[64+4*idx:], slot) }
	put(0, 1)
	put(entries-1, 2)
	sound := append([]byte(nil), head...)
	for _, c := range []struct {
		name, code string
		idx        int
		slot       uint32
	}{
		{"sound", "", entries - 1, 2},
		{"behind the end of the file", "ploop.bat.past-eof", entries - 2, 1 << 20},
		{"another's", "ploop.bat.duplicate", entries - 2, 1},
		{"the first behind the disk", "ploop.bat.beyond-disk", entries, 2},
		{"the second behind the disk", "ploop.bat.beyond-disk", entries + 1, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			copy(head, sound)
			put(c.idx, c.slot)
			path := filepath.Join(t.TempDir(), "image.hds")
			if err := os.WriteFile(path, head, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(path, 3*cluster); err != nil {
				t.Fatal(err)
			}
			r := check(t, path)
			if c.code == "" {
				wantClean(t, c.name, r, "ploop.host.hole", "ploop.host.hole-metadata")
				return
			}
			if !has(r, c.code) {
				show(t, "check", r)
				t.Fatal("not found")
			}
			if c.code == "ploop.bat.duplicate" {
				return // its repair copies 64 MiB
			}
			res, _, _ := repair(t, checker, openFile(t, path, true), func(f fsck.Finding) bool { return f.Code.Name == c.code }, fsck.Options{})
			if has(res.Left, c.code) {
				show(t, "left", res.Left)
				t.Error("not repaired")
			}
		})
	}
}
