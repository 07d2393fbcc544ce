package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/fsck"
	_ "github.com/imagestack/imagestack/fsck/ploopfsck" // the checkers
	_ "github.com/imagestack/imagestack/fsck/qcow2fsck"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/damage"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/open"
	"github.com/imagestack/imagestack/layers/ploop"
)

// matrixRows is every command that there is. A new one is one line: reads for
// one that changes nothing, keeps for one that changes files and not what the
// guest sees, mounts for a mount.
func matrixRows() []row {
	return append(append(compactRows(), fsckRows()...), []row{
		reads("info, qcow2 chain", qcow2Chain("cluster_size=4096"), "image-stack", "info", "top.qcow2"),
		reads("info, bundle", smallBundle, "image-stack", "info", "."),
		reads("info, raw", smallRaw, "image-stack", "info", "disk.raw"),
		reads("map, qcow2 chain", qcow2Chain("cluster_size=16k,extended_l2=on"), "image-stack", "map", "--json", "top.qcow2"),
		reads("map, qcow2 snapshot", qcow2Snapshot, "image-stack", "map", "--snapshot", "s1", "top.qcow2"),
		reads("map, bundle", smallBundle, "image-stack", "map", "DiskDescriptor.xml"),
		reads("map, raw", smallRaw, "image-stack", "map", "disk.raw"),
		reads("fsck -n, qcow2 chain", qcow2Chain("cluster_size=4096"), "image-fsck", "-n", "top.qcow2"),
		reads("fsck -n, bundle", smallBundle, "image-fsck", "-n", "."),
		reads("fsck -n, raw", smallRaw, "image-fsck", "-n", "disk.raw"),
		reads("fsck --dump-json, qcow2", qcow2Snapshot, "image-fsck", "--dump-json", "top.qcow2"),
		dumps("fsck --dump, qcow2", qcow2Snapshot, "top.qcow2"),
		dumps("fsck --dump, ploop", smallBundle, "root.hds"),
		repairs("fsck -p, qcow2 leak", "qcow2", "leak-middle", "-p"),
		repairs("fsck -p, ploop left open", "ploop", "header/in use", "-p"),
		repairs("fsck -y, qcow2 entries into tables", "qcow2", "l2-l2", "-y"),
		repairs("fsck -y, qcow2 doubly used cluster", "qcow2", "l2-duplicate", "-y"),
		repairs("fsck -y, ploop doubly used cluster", "ploop", "bat/duplicate", "-y"),
		repairs("fsck -y, ploop cut off", "ploop", "file/last cluster cut off", "-y"),
		undoes("fsck --undo-apply, qcow2", "qcow2", "l2-duplicate"),
		undoes("fsck --undo-apply, ploop", "ploop", "bat/duplicate"),
		restores("fsck --restore, qcow2", qcow2Snapshot, "top.qcow2", 40),
		restores("fsck --restore, ploop", smallBundle, "root.hds", 48),
		mounts("mount -w, raw", smallRaw, "disk.raw", "-w"),
		mounts("mount -w, bundle", smallBundle, ".", "-w"),
		mounts("mount -w, qcow2 chain", qcow2Chain("cluster_size=4096"), "top.qcow2", "-w"),
		mounts("mount -w, qcow2 chain, extended L2", qcow2Chain("cluster_size=16k,extended_l2=on"), "top.qcow2", "-w"),
		mounts("mount -w, qcow2 snapshots and compression", qcow2Snapshot, "top.qcow2", "-w"),
		mounts("mount -w, qcow2 data file", qcow2DataFile, "top.qcow2", "-w"),
		mounts("mount -w --partitions, qcow2", partitioned, "top.qcow2", "-w", "--partitions"),
		mounts("mount --loop, qcow2 chain", qcow2Chain("cluster_size=4096"), "top.qcow2", "--loop"),
		mounts("mount --loop, bundle", smallBundle, ".", "--loop"),
		mounts("mount -w --loop, raw", smallRaw, "disk.raw", "-w", "--loop"),
		mounts("mount -w --loop, bundle", smallBundle, ".", "-w", "--loop"),
		mounts("mount -w --loop, qcow2 chain", qcow2Chain("cluster_size=4096"), "top.qcow2", "-w", "--loop"),
		mounts("mount --scratch, qcow2 chain", qcow2Chain("cluster_size=4096"), "top.qcow2", "--scratch"),
		mounts("mount --scratch, bundle", smallBundle, ".", "--scratch"),
	}...)
}

// matrixDisk is the size of the disks, in bytes.
const matrixDisk = 1 << 20

func smallRaw(t *testing.T, dir string) {
	b := make([]byte, matrixDisk)
	imgtest.Pattern(b[:300<<10], 1, 0)
	if err := writeSparse(filepath.Join(dir, "disk.raw"), b); err != nil {
		t.Fatal(err)
	}
}

func smallBundle(t *testing.T, dir string) {
	ctx := context.Background()
	if err := ploop.CreateBundle(ctx, dir, ploop.CreateOptions{Size: matrixDisk, ClusterSize: ploop.MinCluster}); err != nil {
		t.Fatal(err)
	}
	s, err := open.Open(ctx, dir, open.Options{Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.WriteAt(ctx, imgtest.PatternBytes(1, 0, 300<<10), 0)
	if err := errors.Join(err, s.Close()); err != nil {
		t.Fatal(err)
	}
}

// qcow2Chain is an image with these options over one of other geometry.
func qcow2Chain(options string) func(t *testing.T, dir string) {
	return func(t *testing.T, dir string) {
		base, top := filepath.Join(dir, "base.qcow2"), filepath.Join(dir, "top.qcow2")
		imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", "cluster_size=8k", base, "1M")
		imgtest.QemuIO(t, "qcow2", base, "write -P 1 0 300k")
		imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", options, "-b", "base.qcow2", "-F", "qcow2", top)
		imgtest.QemuIO(t, "qcow2", top, "write -P 2 64k 64k", "write -z 160k 32k")
	}
}

func qcow2Snapshot(t *testing.T, dir string) {
	top := filepath.Join(dir, "top.qcow2")
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", top, "1M")
	imgtest.QemuIO(t, "qcow2", top, "write -P 1 0 128k", "write -c -P 2 128k 128k")
	imgtest.QemuImg(t, "snapshot", "-c", "s1", top)
	imgtest.QemuIO(t, "qcow2", top, "write -P 3 64k 32k")
}

func qcow2DataFile(t *testing.T, dir string) {
	t.Chdir(dir) // QEMU looks there for the data file
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096,data_file=data", "top.qcow2", "1M")
	imgtest.QemuIO(t, "qcow2", "top.qcow2", "write -P 1 0 300k")
}

// partitionAt is where the partition begins, in bytes.
const partitionAt = 64 << 10

// partitioned is a disk with one partition, up to the end.
func partitioned(t *testing.T, dir string) {
	top := filepath.Join(dir, "top.qcow2")
	raw := make([]byte, matrixDisk)
	imgtest.Pattern(raw[partitionAt:300<<10], 1, 0)
	e := raw[446:]
	e[4], e[8], e[12], e[13] = 0x83, 128, 0x80, 7 // from sector 128, 1920 sectors
	raw[510], raw[511] = 0x55, 0xaa
	src := filepath.Join(t.TempDir(), "raw")
	if err := os.WriteFile(src, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	imgtest.QemuImg(t, "convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4096", src, top)
}

// command is a tool whose last argument is a name in the directory.
func command(args []string) func(r *matrixRun) (outcome, error) {
	return func(r *matrixRun) (outcome, error) {
		a := append([]string{}, args[1:]...)
		a[len(a)-1] = filepath.Join(r.dir, a[len(a)-1])
		return r.tool(args[0], a...)
	}
}

// exits checks what a command answered that met the fault: it failed, with one of
// these codes, and said why; or the fault did no harm.
func (r *matrixRun) exits(o outcome, bad ...int) error {
	switch {
	case !r.broken():
		if !r.unharmed() && r.clean.stdout != "" {
			return fmt.Errorf("exit %d; without a fault it says %d\n%s", o.exit, r.clean.exit, r.clean.stdout)
		}
		return nil
	case r.mode == modeKill && o.exit == -1, r.unharmed():
		return nil
	}
	r.failed = true
	for _, code := range bad {
		if o.exit == code || o.exit&code != 0 && strings.HasPrefix(r.name, "fsck") {
			return r.explains(o.stdout + o.stderr) // it may be a helper that was killed
		}
	}
	return fmt.Errorf("exit %d, want %d", o.exit, bad)
}

// reads is a command that changes nothing: it fails, with exit 1 or (fsck) 8,
// and says why.
func reads(name string, setup func(*testing.T, string), args ...string) row {
	run := command(args)
	return row{name: name, setup: setup,
		run: func(r *matrixRun) error {
			o, err := run(r)
			return errors.Join(err, r.exits(o, failure(args[0])))
		},
		judge: func(r *matrixRun) error { return r.untouched() },
	}
}

// failure is the exit code of a tool that could not do what it should.
func failure(tool string) int {
	if tool == "image-fsck" {
		return fsck.ExitOperational
	}
	return 1
}

// dumps is image-fsck --dump over an older dump.
func dumps(name string, setup func(*testing.T, string), image string) row {
	return row{name: name,
		setup: func(t *testing.T, dir string) {
			setup(t, dir)
			wantExit(t, 0, "image-fsck", "--dump", filepath.Join(dir, "out"), filepath.Join(dir, image))
		},
		run: func(r *matrixRun) error {
			o, err := r.tool("image-fsck", "--dump", filepath.Join(r.dir, "out"), filepath.Join(r.dir, image))
			return errors.Join(err, r.exits(o, fsck.ExitOperational))
		},
		judge: func(r *matrixRun) error { // the old one or a new one, which are the same
			return r.soonUntouched()
		},
	}
}

// damaged finds a case of the damage kit.
func damaged(format, name string) damage.Damage {
	for _, d := range damage.Qcow2() {
		if format == "qcow2" && d.Name == name {
			return d
		}
	}
	for _, d := range damage.Ploop() {
		if format == "ploop" && d.Name == name {
			return d.Damage
		}
	}
	panic("no damage " + name)
}

func imageOf(format string) string {
	if format == "ploop" {
		return "image.hds"
	}
	return "image"
}

// repairs is a repair of a kind of damage.
func repairs(name, format, kind, flag string) row {
	d, image := damaged(format, kind), imageOf(format)
	return row{name: name,
		setup: func(t *testing.T, dir string) { d.Build(t, dir) },
		run: func(r *matrixRun) error {
			o, err := r.tool("image-fsck", flag, filepath.Join(r.dir, image))
			if o.exit == fsck.ExitCorrected && r.broken() {
				return err // it got over it: then all must be well, see below
			}
			return errors.Join(err, r.exits(o, fsck.ExitOperational))
		},
		judge: func(r *matrixRun) error {
			if err := r.undone(image); err != nil {
				return err
			}
			o, err := r.tool("image-fsck", flag, filepath.Join(r.below, image))
			if err != nil {
				return err
			}
			if o.exit&^fsck.ExitCorrected != 0 || o.exit != 0 && r.said.exit == fsck.ExitCorrected {
				return fmt.Errorf("repaired again: exit %d", o.exit)
			}
			return r.same(image, d)
		},
	}
}

// undone checks that the undo files, if any, lead back, and that without them
// nothing was changed.
func (r *matrixRun) undone(image string) error {
	was, err1 := os.ReadFile(filepath.Join(r.pristine, image))
	now, err2 := os.ReadFile(filepath.Join(r.below, image))
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	undo, err := backend.Open(filepath.Join(r.below, image+".undo"), backend.Options{})
	if errors.Is(err, os.ErrNotExist) {
		if string(was) != string(now) {
			return errors.New("the image was changed and there is no undo file")
		}
		return nil
	}
	if err != nil {
		return err
	}
	defer undo.Close()
	back := backend.NewMemBytes(image, now)
	switch _, err := fsck.ApplyUndo(context.Background(), undo, back, fsck.UndoOptions{}); {
	case errors.Is(err, fsck.ErrNothingToUndo):
	case err != nil:
		return fmt.Errorf("undo: %w", err)
	}
	if string(back.Bytes()) != string(was) {
		return errors.New("undone, the image is not what it was")
	}
	return nil
}

// same checks what the guest sees after a repair.
func (r *matrixRun) same(image string, d damage.Damage) error {
	want, err := os.ReadFile(damage.Original(r.pristine))
	if err != nil {
		return err
	}
	got, err := diskOf(filepath.Join(r.below, image), d.Format)
	if err != nil {
		return err
	}
	var lost blockmap.Set
	for _, l := range d.Lost {
		lost.Add(l.Off, l.Len)
	}
	if len(got) != len(want) {
		return fmt.Errorf("a disk of %d bytes, want %d", len(got), len(want))
	}
	for i := range got {
		if got[i] != want[i] && !lost.Contains(int64(i), 1) {
			return fmt.Errorf("the guest's byte %#x is %#x, want %#x", i, got[i], want[i])
		}
	}
	return nil
}

// diskOf is what the guest sees.
func diskOf(path, format string) ([]byte, error) {
	ctx := context.Background()
	s, err := openStack(path, open.Options{Format: format})
	if err != nil {
		return nil, err
	}
	p := make([]byte, s.Size())
	_, err = s.ReadAt(ctx, p, 0)
	return p, errors.Join(err, s.Close())
}

// openStack opens a stack. Of another row's program that is just being started
// the kernel may hold our own files, and so their locks, for a moment more.
func openStack(path string, o open.Options) (s *layers.Stack, err error) {
	for range 100 {
		if s, err = open.Open(context.Background(), path, o); !errors.Is(err, layers.ErrInUse) {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	return s, err
}

// undoes is image-fsck --undo-apply after a repair.
func undoes(name, format, kind string) row {
	d, image := damaged(format, kind), imageOf(format)
	return row{name: name,
		setup: func(t *testing.T, dir string) {
			d.Build(t, dir)
			b, err := os.ReadFile(filepath.Join(dir, image))
			if err := errors.Join(err, os.WriteFile(filepath.Join(dir, "damaged"), b, 0o600)); err != nil {
				t.Fatal(err)
			}
			wantExit(t, fsck.ExitCorrected, "image-fsck", "-y", filepath.Join(dir, image))
		},
		run: func(r *matrixRun) error {
			o, err := r.undoApply(r.dir, image)
			return errors.Join(err, r.exits(o, fsck.ExitOperational))
		},
		judge: func(r *matrixRun) error {
			if o, err := r.undoApply(r.below, image); err != nil || o.exit != 0 {
				return errors.Join(fmt.Errorf("done again: exit %d", o.exit), err)
			}
			now, err1 := os.ReadFile(filepath.Join(r.below, image))
			was, err2 := os.ReadFile(filepath.Join(r.below, "damaged"))
			if err := errors.Join(err1, err2); err != nil || string(now) != string(was) {
				return errors.Join(errors.New("the image is not what it was before the repair"), err)
			}
			return r.untouched(image)
		},
	}
}

func (r *matrixRun) undoApply(dir, image string) (outcome, error) {
	return r.tool("image-fsck", "--undo-apply", filepath.Join(dir, image+".undo"), filepath.Join(dir, image))
}

// restores is image-fsck --restore of an image, 8 bytes of whose header at off
// are gone.
func restores(name string, setup func(*testing.T, string), image string, off int64) row {
	restore := func(r *matrixRun, dir string) (outcome, error) {
		return r.tool("image-fsck", "--restore", filepath.Join(dir, "dump"), "-y", filepath.Join(dir, image))
	}
	return row{name: name,
		setup: func(t *testing.T, dir string) {
			setup(t, dir)
			path := filepath.Join(dir, image)
			b, err := diskOf(path, "")
			if err := errors.Join(err, os.WriteFile(damage.Original(dir), b, 0o600)); err != nil {
				t.Fatal(err)
			}
			wantExit(t, 0, "image-fsck", "--dump", filepath.Join(dir, "dump"), path)
			writeRange(t, path, off, make([]byte, 8))
		},
		run: func(r *matrixRun) error {
			o, err := restore(r, r.dir)
			if o.exit == fsck.ExitCorrected && r.broken() {
				return err // it got over it: then all must be well, see below
			}
			return errors.Join(err, r.exits(o, fsck.ExitOperational))
		},
		judge: func(r *matrixRun) error {
			if err := r.undone(image); err != nil {
				return err
			}
			// Of an image that was restored in full it says that it is clean.
			if _, err := restore(r, r.below); err != nil {
				return err
			}
			return r.same(image, damage.Damage{})
		},
	}
}
