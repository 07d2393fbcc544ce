package crash_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/imgtest/crash"
	"github.com/imagestack/imagestack/layers/open"
	"github.com/imagestack/imagestack/layers/ploop"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// fsckTable is what image-fsck changes besides full repairs. A new one is one
// line.
func fsckTable(t testing.TB) []op {
	const k = 1 << 10
	must := func(d *damaged, err error) *damaged {
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	p2, q4 := ploopNew(2, 512*k-512), qcow2New(qcow2.CreateOptions{Size: 256 * k, ClusterSize: 4 * k})
	partP := must(damage(filled(p2, half(64*k)), inUse, twice(0, 2))).partly()
	partQ := must(damage(filled(q4, half(24*k)), notCopied, secondOwner)).partly()
	lostP := must(lostRoots(t, filled(p2, half(64*k)), 48, 4))
	lostQ := must(lostRoots(t, filled(q4, half(24*k)), 40, 8))
	return []op{
		{Name: "fsck/partial repair of ploop", Setup: partP.make, Run: partP.repair, Judge: partP.partJudge, Fixed: true},
		{Name: "fsck/partial repair of qcow2", Setup: partQ.make, Run: partQ.repair, Judge: partQ.partJudge, Fixed: true},
		{Name: "fsck/undo of a partial repair of qcow2", Setup: partQ.repaired, Run: undoRepair, Judge: partQ.undoneJudge, Fixed: true},
		{Name: "fsck/restore of ploop", Setup: lostP.make, Run: lostP.restore, Judge: lostP.judge, Fixed: true},
		{Name: "fsck/restore of qcow2", Setup: lostQ.make, Run: lostQ.restore, Judge: lostQ.judge, Fixed: true},
	}
}

// fsckNames are runs of image-fsck with the names of its undo files.
func fsckNames() []crash.NamesOp {
	return []crash.NamesOp{
		{Name: "fsck/repair with its undo file", Setup: brokenFile, Run: repairFile, Judge: repairedFile},
		{Name: "fsck/repair of a descriptor", Setup: brokenBundle, Run: repairBundle, Judge: repairedBundle},
	}
}

// partly is image-fsck -p, which leaves some of the damage.
func (d *damaged) partly() *damaged {
	part := *d
	part.decide = fsck.DecidePreen
	return &part
}

// secondOwner makes the third entry of the first L2 table name the cluster of
// the first, too, which no repair can decide without a loss.
func secondOwner(p []byte) []byte {
	at := l2Of(p)
	copy(p[at+16:at+24], p[at:at+8])
	return p
}

// partJudge: the same as for a full repair, but what is left when it was done
// again is what the run without a power cut has left.
func (d *damaged) partJudge(ctx context.Context, st *crash.State) error {
	if err := d.takenBack(ctx, st); err != nil {
		return err
	}
	if err := st.Again(ctx); err != nil {
		return fmt.Errorf("repaired again: %w", err)
	}
	now, err1 := d.look(ctx, st.Files[crash.ImageFile])
	want, err2 := d.look(ctx, st.Final(crash.ImageFile))
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	if want.worst < fsck.Damage {
		return errors.New("-p has left no damage: this is no partial repair")
	}
	if now.worst != want.worst || now.findings != want.findings {
		return fmt.Errorf("repaired again, it is worse: %v, %v", now.findings, want.findings)
	}
	if !bytes.Equal(now.disk, want.disk) {
		return errors.New("repaired again, the guest sees something else")
	}
	return nil
}

type looked struct {
	worst    fsck.Severity
	findings string
	disk     []byte
}

// look is what our checker and the guest see.
func (d *damaged) look(ctx context.Context, m *backend.Mem) (l looked, err error) {
	dir, s := alone(d.format, m)
	if l.disk, err = s.Content(ctx, ""); err != nil {
		return l, err
	}
	f, err := dir.Open(crash.ImageFile, false)
	if err != nil {
		return l, err
	}
	rep, err := fsck.CheckFile(ctx, f, d.format)
	if err := errors.Join(err, f.Close()); err != nil {
		return l, err
	}
	var codes []string
	for _, c := range rep.Counts {
		codes = append(codes, fmt.Sprint(c.Code.Name, " ", c.Found))
	}
	slices.Sort(codes)
	l.worst, l.findings = rep.Worst(), strings.Join(codes, ", ")
	return l, nil
}

const dumpFile = "dump"

// lostRoots is an image with a dump of its metadata, of whose header n bytes at
// off are gone.
func lostRoots(t testing.TB, s setup, off, n int) (*damaged, error) {
	img, err := s(0)
	if err != nil {
		return nil, err
	}
	dir := t.TempDir()
	path := filepath.Join(dir, crash.ImageFile)
	if err := os.WriteFile(path, img.Files[crash.ImageFile].Bytes(), 0o600); err != nil {
		return nil, err
	}
	ctx := context.Background()
	dumped, err := fsck.OpenDump(ctx, path, open.Options{Format: img.Format})
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := errors.Join(dumped.Write(ctx, &b), dumped.Close()); err != nil {
		return nil, err
	}
	d, err := damage(s, func(p []byte) []byte { clear(p[off : off+n]); return p })
	if err != nil {
		return nil, err
	}
	make := d.make
	d.make = func(seed uint64) (*crash.Image, error) {
		img, err := make(seed)
		if err == nil {
			img.Files[dumpFile] = backend.NewMemBytes(dumpFile, b.Bytes())
		}
		return img, err
	}
	return d, nil
}

// restore is image-fsck --restore -y.
func (d *damaged) restore(ctx context.Context, s *crash.Session) (err error) {
	name := undoFile
	if s.Again {
		name = undoFile + ".1"
	}
	var files []backend.File
	defer func() {
		for _, f := range files {
			err = errors.Join(err, f.Close())
		}
	}()
	for name, writable := range map[string]bool{crash.ImageFile: true, dumpFile: false, name: true} {
		f, err := s.Dir.Open(name, writable)
		if err != nil {
			return err
		}
		files = append(files, f)
	}
	find := func(name string) backend.File {
		return files[slices.IndexFunc(files, func(f backend.File) bool { return f.Name() == name })]
	}
	r, err := fsck.Restore(ctx, find(dumpFile), find(crash.ImageFile), fsck.Options{Parallel: 1}, fsck.PlanOptions{})
	if errors.Is(err, fsck.ErrNotDamaged) {
		return nil // it was restored
	}
	if err != nil {
		return err
	}
	_, err = r.Plan.Execute(ctx, fsck.ExecuteOptions{Undo: find(name), Lost: lost{s.Dir}})
	return errors.Join(err, r.Close())
}

// brokenFile is a qcow2 image with wrong counts.
func brokenFile(dir string) error {
	d, err := damage(filled(qcow2New(qcow2.CreateOptions{Size: 128 << 10, ClusterSize: 4 << 10}), half(24<<10)), badCounts(4), notCopied)
	if err != nil {
		return err
	}
	img, err := d.make(0)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, crash.ImageFile), img.Files[crash.ImageFile].Bytes(), 0o600)
}

func repairFile(ctx context.Context, dir string) error {
	return fsckRun(ctx, filepath.Join(dir, crash.ImageFile))
}

// fsckRun is image-fsck -y.
func fsckRun(ctx context.Context, path string) (err error) {
	fsck.Run(ctx, []string{path}, fsck.RunOptions{Decide: fsck.DecideAll, Serial: true}, func(r *fsck.ImageResult) {
		if exit := r.Exit(); exit&^fsck.ExitCorrected != 0 {
			err = fmt.Errorf("exit %d: %w", exit, r.Err)
			for i := range r.Files {
				err = errors.Join(err, r.Files[i].Err)
			}
		}
	})
	return err
}

// repairedFile: whenever the image is not what it was, undo files that have
// names lead back to that; once it was repaired it is sound.
func repairedFile(_ context.Context, dir string, done bool) error {
	path := filepath.Join(dir, crash.ImageFile)
	now, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	back, err := takeBack(path, now)
	if err != nil {
		return err
	}
	scratch, err := os.MkdirTemp("", "was")
	if err != nil {
		return err
	}
	defer os.RemoveAll(scratch)
	if err := brokenFile(scratch); err != nil {
		return err
	}
	was, err := os.ReadFile(filepath.Join(scratch, crash.ImageFile))
	if err != nil {
		return err
	}
	if !bytes.Equal(back, was) {
		return errors.New("undone, the image is not what it was")
	}
	if !done {
		return nil
	}
	rep, err := fsck.CheckFile(context.Background(), backend.NewMemBytes(path, now), "qcow2")
	if err == nil && rep.Worst() > fsck.Note {
		err = fmt.Errorf("repaired, but %v", rep.Worst())
	}
	return err
}

// takeBack applies the undo files of a file, the last first.
func takeBack(path string, now []byte) ([]byte, error) {
	undos, err := filepath.Glob(path + ".undo*")
	if err != nil {
		return nil, err
	}
	slices.Sort(undos)
	back := backend.NewMemBytes(path, now)
	for _, name := range slices.Backward(undos) {
		b, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		_, err = fsck.ApplyUndo(context.Background(), backend.NewMemBytes(name, b), back, fsck.UndoOptions{})
		if err != nil && !errors.Is(err, fsck.ErrNothingToUndo) {
			return nil, err
		}
	}
	return back.Bytes(), nil
}

// brokenBundle is one whose descriptor is empty.
func brokenBundle(dir string) error {
	if err := oldBundle(dir); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, ploop.DescriptorName), nil, 0o600)
}

func repairBundle(ctx context.Context, dir string) error { return fsckRun(ctx, dir) }

// repairedBundle: the descriptor is empty as it was, or whole; and whole once
// it was repaired.
func repairedBundle(ctx context.Context, dir string, done bool) error {
	b, err := os.ReadFile(filepath.Join(dir, ploop.DescriptorName))
	if err != nil {
		return err
	}
	if len(b) > 0 || done {
		if err := bundleOrNone(ctx, dir, true); err != nil {
			return err
		}
		if len(b) > 0 {
			if back, err := takeBack(filepath.Join(dir, ploop.DescriptorName), b); err != nil || len(back) > 0 {
				return errors.Join(fmt.Errorf("undone, the descriptor has %d bytes", len(back)), err)
			}
		}
	}
	return nil
}
