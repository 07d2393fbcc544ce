package open

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/qcow2"
	"github.com/imagestack/imagestack/layers/raw"
)

// copyClone stands for backend.CloneRange where files are wrapped or the
// filesystem has no reflinks: it copies.
func copyClone(dst, src backend.File, srcOff, off, n int64) error {
	done, err := dst.CopyRange(src, srcOff, off, n)
	if err == nil && done != n {
		err = io.ErrShortWrite
	}
	return err
}

// flatChain makes a chain of three whose extents are of every kind: mapped on
// block boundaries and off them, compressed, zeros, and holes.
func flatChain(t *testing.T, dir string) (paths []string, want []byte) {
	t.Helper()
	base, mid, top := filepath.Join(dir, "base.raw"), filepath.Join(dir, "mid.qcow2"), filepath.Join(dir, "top.qcow2")
	if err := os.WriteFile(base, imgtest.PatternBytes(1, 0, 100_000+512), 0o600); err != nil {
		t.Fatal(err)
	}
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "-b", base, "-F", "raw", mid, "512k")
	imgtest.QemuIO(t, "qcow2", mid, "write -P 2 10k 9k", "write -c -P 3 64k 512", "write -z 80k 4k", "write -P 4 200k 40k")
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", mid, "-F", "qcow2", top, "600k")
	imgtest.QemuIO(t, "qcow2", top, "write -P 5 4k 12k", "write -c -P 6 128k 8k", "write -P 7 300k 40k", "write -P 8 598k 2k")
	out := filepath.Join(dir, "want")
	imgtest.QemuRaw(t, "qcow2", top, out)
	want, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return []string{top, mid, base}, want
}

// flatRun flattens the chain into a new file; prepare may arm the faults of the
// destination (the first) and the sources. It returns the content of the flat
// view, or the error, and of each file how many operations flattening it took.
func flatRun(t *testing.T, paths []string, prepare func(faults []*backend.Fault)) (got []byte, ops []flatOps, failed error) {
	t.Helper()
	ctx := context.Background()
	before := openFiles(t)
	defer func() {
		if now := openFiles(t); now != before {
			t.Errorf("%d files are open, there were %d", now, before)
		}
	}()
	dir := t.TempDir()
	defer func() {
		if names, err := os.ReadDir(dir); err != nil || len(names) > 0 {
			t.Errorf("left behind: %v (%v)", names, err)
		}
	}()
	f, err := scratchFile(dir)
	if err != nil {
		t.Fatal(err)
	}
	faults := []*backend.Fault{backend.NewFault(f)}
	var pile []layers.Layer
	for _, path := range paths {
		f, err := backend.Open(path, backend.Options{})
		if err != nil {
			t.Fatal(err)
		}
		faults = append(faults, backend.NewFault(f))
		var l layers.Layer
		if filepath.Ext(path) == ".raw" {
			l, err = raw.Open(ctx, faults[len(faults)-1], layers.OpenOptions{Path: path})
		} else {
			l, err = qcow2.Open(ctx, faults[len(faults)-1], layers.OpenOptions{Path: path})
		}
		if err != nil {
			t.Fatal(err)
		}
		pile = append(pile, l)
	}
	s, err := layers.NewStack(pile, layers.StackOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range faults {
		ops = append(ops, flatOps{name: f.Name(), all: -f.Count(backend.OpAny)})
	}
	prepare(faults)
	flat, err := flatten(ctx, s, faults[0], true, copyClone)
	for k, f := range faults {
		ops[k].all += f.Count(backend.OpAny)
		ops[k].clones, ops[k].writes, ops[k].failed = f.Count(backend.OpCopy), f.Count(backend.OpWrite), f.Fired()
	}
	if err != nil {
		if err := errors.Join(s.Close(), faults[0].Close()); err != nil { // both are still ours
			t.Error(err)
		}
		return nil, ops, err
	}
	for _, f := range faults {
		f.Clear()
	}
	got = make([]byte, flat.Size())
	if n, err := flat.ReadAt(ctx, got, 0); n != len(got) {
		t.Errorf("read %d of %d bytes of the flat view: %v", n, len(got), err)
	}
	if err := flat.Close(); err != nil {
		t.Error(err)
	}
	return got, ops, nil
}

// flatOps is what a flattening did with a file.
type flatOps struct {
	name                        string
	all, clones, writes, failed int
}

func openFiles(t *testing.T) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

// TestFlatFaults makes each operation of a flattening fail, on the new file and
// on each of the files of the image, in each way: the error is told, or the flat
// view is right, and no file stays open.
func TestFlatFaults(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	paths, want := flatChain(t, t.TempDir())
	got, clean, err := flatRun(t, paths, func([]*backend.Fault) {})
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("without a fault: %v, or other content", err)
	}
	if clean[0].clones == 0 || clean[0].writes == 0 {
		t.Fatal("nothing was cloned, or nothing was copied")
	}
	total, tried, told := 0, 0, 0
	for k, c := range clean {
		total += c.all
		for _, r := range []backend.Rule{
			{Err: unix.EIO}, {Err: unix.ENOSPC}, {Err: unix.ENOSPC, Short: 300},
			{Err: unix.EIO, Short: 300},
			{Err: unix.EIO, Sticky: true}, {Err: unix.EINVAL}, {Err: unix.EOPNOTSUPP},
			{Err: fmt.Errorf("%w (%w)", backend.ErrNotShared, unix.EINVAL)},
		} {
			for i := 1; i <= c.all; i++ {
				r.On, r.Nth = backend.OpAny, i
				got, ops, err := flatRun(t, paths, func(f []*backend.Fault) { f[k].Inject(r) })
				if ops[k].failed == 0 {
					t.Errorf("%s, operation %d of %d was not reached", c.name, i, c.all)
				}
				tried++
				switch {
				case err != nil && r.Sticky && errors.Is(err, layers.ErrCorrupt):
					told++ // it could not even be asked for its size
				case err != nil && !errors.Is(err, r.Err):
					t.Errorf("%s, operation %d, %v after %d bytes: the error is %v", c.name, i, r.Err, r.Short, err)
				case err != nil:
					told++
				case !bytes.Equal(got, want):
					t.Errorf("%s, operation %d, %v after %d bytes: no error, and other content", c.name, i, r.Err, r.Short)
				}
			}
		}
	}
	if told == 0 {
		t.Error("no fault was told")
	}
	t.Logf("%d operations, %d faults, %d errors", total, tried, told)
}
