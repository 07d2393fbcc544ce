package ploopfsck_test

import (
	"context"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/damage"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/ploop"
)

// check checks a file, which it opens for reading.
func check(t testing.TB, path string) *fsck.Report {
	t.Helper()
	r, err := fsck.CheckFile(context.Background(), openFile(t, path, false), "ploop")
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// wantClean wants nothing worse than the notes named.
func wantClean(t testing.TB, what string, r *fsck.Report, notes ...string) {
	t.Helper()
	for _, n := range r.Counts {
		known := false
		for _, name := range notes {
			known = known || n.Code.Name == name
		}
		if n.Code.Severity > fsck.Note || !known {
			show(t, what, r)
			t.Errorf("%s: %s in a sound image", what, n.Code)
		}
	}
}

// TestSoundPloop: what ploop's tool makes is clean.
func TestSoundPloop(t *testing.T) {
	imgtest.RequirePloop(t)
	imgtest.Require(t, "qemu-io")
	for _, version := range []int{1, 2} {
		t.Run(strconv.Itoa(version), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			xml := filepath.Join(dir, "DiskDescriptor.xml")
			images := imgtest.PloopBundle(t, dir, "expanded", version, 16<<20, 3)
			each := func(what string, notes ...string) {
				t.Helper()
				for _, img := range imgtest.PloopChain(t, xml) {
					if img.Format == "raw" {
						continue
					}
					wantClean(t, what+" "+img.Path, check(t, img.Path), notes...)
				}
				f := openFile(t, xml, false)
				r, err := fsck.CheckFile(context.Background(), f, "ploop-descriptor")
				if err != nil {
					t.Fatal(err)
				}
				wantClean(t, what+" descriptor", r)
			}
			each("init and snapshot")
			for k, img := range images {
				f := openFile(t, img.Path, true)
				i, err := ploop.Open(context.Background(), f, layers.OpenOptions{Writable: true})
				if err != nil {
					t.Fatal(err)
				}
				for _, idx := range []int64{int64(k), 9, 3} {
					if err := i.WriteAt(context.Background(), imgtest.PatternBytes(uint64(k), 0, 1<<20), idx<<20, below{}); err != nil {
						t.Fatal(err)
					}
				}
				if err := i.Close(); err != nil {
					t.Fatal(err)
				}
			}
			each("written")
			imgtest.PloopRun(t, "grow", "-s", "40960K", xml)
			// Growing leaves CIF_Empty, or sets it.
			const habit = "ploop.header.empty-set"
			each("grown", habit)
			imgtest.PloopRun(t, "snapshot-merge", xml)
			each("merged", habit)
			imgtest.PloopRun(t, "snapshot-merge", "-A", xml)
			each("merged all", habit)
			imgtest.PloopRun(t, "convert", "-v", strconv.Itoa(3-version), xml)
			each("converted", habit)
		})
	}
}

// TestSoundQemu: what QEMU makes has notes at most, and the repair makes it
// what ploop accepts.
func TestSoundQemu(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	imgtest.RequirePloop(t)
	habits := []string{"ploop.header.empty-missing", "ploop.header.empty-set", "ploop.host.hole", "ploop.host.hole-metadata",
		"ploop.header.partial-cluster", "ploop.header.cluster-size-odd"}
	for _, c := range []struct {
		name, size, cluster string
		ploop               bool
		commands            []string
	}{
		{"empty", "64M", "1M", true, nil},
		{"written", "64M", "1M", true, []string{"write -P 7 1000k 300k", "write -P 8 60M 4M", "write -P 9 512 512"}},
		{"small clusters", "1M", "4k", false, []string{"write -P 7 10k 300k"}},
		{"odd clusters", "30M", "3M", false, []string{"write -P 7 10M 5k"}},
		{"partial", "100k", "64k", true, []string{"write -P 7 90k 10k"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "q.hds")
			imgtest.QemuImg(t, "create", "-f", "parallels", "-o", "cluster_size="+c.cluster, path, c.size)
			if len(c.commands) > 0 {
				imgtest.QemuIO(t, "parallels", path, c.commands...)
			}
			r := check(t, path)
			wantClean(t, "check", r, habits...)
			raw, again := path+".raw", path+".raw2"
			imgtest.QemuRaw(t, "parallels", path, raw)
			f := openFile(t, path, true)
			res, _, lost := repair(t, checker, f, fsck.DecidePreen, fsck.Options{})
			if l := res.Left; l.Worst() > fsck.Note || len(lost) > 0 {
				show(t, "after", l)
				t.Error("not clean after preen")
			}
			imgtest.QemuRaw(t, "parallels", path, again)
			imgtest.SameContent(t, raw, again)
			if exit, out := imgtest.PloopCheck(t, path); c.ploop && exit != 0 {
				t.Errorf("ploop check: %d\n%s", exit, out)
			}
			if exit, out := imgtest.QemuCheck(t, path, "ploop"); exit != 0 {
				t.Errorf("qemu-img check: %d\n%s", exit, out)
			}
		})
	}
}

// TestSoundEditor: every state that a power cut leaves of our own editor has
// leaks at most, and is repaired without loss.
func TestSoundEditor(t *testing.T) {
	ctx := context.Background()
	for _, version := range []int{1, 2} {
		m := backend.NewMemBytes("img.hds", damage.NewPloop(version, 64<<10, 64, 1, 5, 6).B)
		rec := backend.NewRecorder()
		f, err := rec.Wrap(m)
		if err != nil {
			t.Fatal(err)
		}
		i, err := ploop.Open(ctx, f, layers.OpenOptions{Writable: true})
		if err != nil {
			t.Fatal(err)
		}
		none := below{}
		for k := range int64(4) {
			if err := i.WriteAt(ctx, imgtest.PatternBytes(7, 0, 100<<10), 3000+k*500<<10, none); err != nil {
				t.Fatal(err)
			}
			if err := i.ZeroAt(ctx, 5<<16, 2<<16, true, none); err != nil {
				t.Fatal(err)
			}
			if err := i.Sync(ctx); err != nil {
				t.Fatal(err)
			}
		}
		if err := i.Close(); err != nil {
			t.Fatal(err)
		}
		states := 0
		for s := range rec.States(backend.StateOptions{MaxPerEpoch: 12}) {
			states++
			f := s.Files[0]
			r, err := fsck.CheckFile(ctx, f, "ploop")
			if err != nil {
				t.Fatal(err)
			}
			if r.Worst() > fsck.Leak {
				show(t, "crashed", r)
				t.Fatalf("%s: %v", s, r.Worst())
			}
			want := guestOf(t, f)
			res, _, lost := repair(t, checker, f, fsck.DecidePreen, fsck.Options{})
			if res.Left.Worst() > fsck.Note || len(lost) > 0 {
				show(t, "repaired", res.Left)
				t.Fatalf("%s: not clean after preen", s)
			}
			sameOutside(t, guestOf(t, f), want, nil)
		}
		if states < 20 {
			t.Errorf("only %d states", states)
		}
	}
}

// below is a parent that is empty.
type below struct{}

func (below) ReadAt(_ context.Context, p []byte, _ int64) error  { clear(p); return nil }
func (below) IsZero(context.Context, int64, int64) (bool, error) { return true, nil }
