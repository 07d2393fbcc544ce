package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/layers/open"
	"github.com/imagestack/imagestack/layers/ploop"
)

// compactRows are the runs of image-compact in the fault matrix.
func compactRows() []row {
	return []row{
		estimates("compact -n, qcow2", holedQcow2("cluster_size=4096"), "top.qcow2"),
		estimates("compact -n, bundle", holedBundle, "."),
		compacts("compact, qcow2", holedQcow2("cluster_size=4096"), "top.qcow2", "top.qcow2"),
		compacts("compact, qcow2 of 64 KiB", holedQcow2("cluster_size=64k"), "top.qcow2", "top.qcow2"),
		compacts("compact, qcow2 over a parent", holedOverlay, "top.qcow2", "top.qcow2", "--dedup-parent"),
		compacts("compact, bundle", holedBundle, ".", "root.hds"),
		compacts("compact, raw", holedRaw, "disk.raw", "disk.raw"),
		copies("compact --to", holedQcow2("cluster_size=4096"), "top.qcow2"),
	}
}

// estimates is image-compact -n. What cannot be read of the guest is in the
// report, and counts as used.
func estimates(name string, setup func(*testing.T, string), image string) row {
	return row{name: name, setup: setup,
		run: func(r *matrixRun) error {
			o, err := r.tool("image-compact", "-n", "--json", filepath.Join(r.dir, image))
			if r.broken() && o.exit == 0 && strings.Contains(o.stdout, `"unreadable"`) {
				return errors.Join(err, r.explains(o.stdout))
			}
			return errors.Join(err, r.exits(o, 1))
		},
		judge: func(r *matrixRun) error { return r.untouched() },
	}
}

// holedQcow2 is an image with zeros at the front of the file, a snapshot, and
// compressed clusters.
func holedQcow2(options string) func(t *testing.T, dir string) {
	return func(t *testing.T, dir string) {
		top := filepath.Join(dir, "top.qcow2")
		imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", options, top, "1M")
		imgtest.QemuIO(t, "qcow2", top, "write -P 0 0 256k", "write -c -P 2 256k 128k", "write -P 3 384k 64k")
		imgtest.QemuImg(t, "snapshot", "-c", "s1", top)
		imgtest.QemuIO(t, "qcow2", top, "write -P 0 512k 128k", "write -P 4 640k 128k", "write -P 5 384k 16k")
	}
}

func holedOverlay(t *testing.T, dir string) {
	qcow2Chain("cluster_size=4096")(t, dir)
	imgtest.QemuIO(t, "qcow2", filepath.Join(dir, "top.qcow2"), "write -P 1 0 64k", "write -P 0 600k 64k", "write -P 3 700k 64k")
}

func holedBundle(t *testing.T, dir string) {
	ctx := context.Background()
	if err := ploop.CreateBundle(ctx, dir, ploop.CreateOptions{Size: matrixDisk, ClusterSize: ploop.MinCluster}); err != nil {
		t.Fatal(err)
	}
	s, err := open.Open(ctx, dir, open.Options{Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	_, err1 := s.WriteAt(ctx, make([]byte, 256<<10), 0)
	_, err2 := s.WriteAt(ctx, imgtest.PatternBytes(1, 0, 300<<10), 512<<10)
	if err := errors.Join(err1, err2, s.Close()); err != nil {
		t.Fatal(err)
	}
}

func holedRaw(t *testing.T, dir string) {
	b := make([]byte, matrixDisk)
	imgtest.Pattern(b[512<<10:800<<10], 1, 0)
	if err := os.WriteFile(filepath.Join(dir, "disk.raw"), b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// compacts is image-compact of the image that is called name; file is what it
// works on. Whatever goes wrong, the guest and its snapshots see the same, and
// the run can be resumed, or given up.
func compacts(name string, setup func(*testing.T, string), image, file string, flags ...string) row {
	flags = append(flags, "--json") // in which what may vary is known
	return row{name: name, setup: setup,
		run: func(r *matrixRun) error {
			o, err := r.tool("image-compact", append(flags, filepath.Join(r.dir, image))...)
			if r.broken() && o.exit == 0 {
				return err // it got over it: then all must be well, see below
			}
			return errors.Join(err, r.exits(o, 1))
		},
		judge: func(r *matrixRun) error {
			if err := r.sameDisk(file); err != nil {
				return err
			}
			if err := r.compactGoesOn(image, file, flags); err != nil {
				return err
			}
			if err := r.sameDisk(file); err != nil {
				return fmt.Errorf("after going on: %w", err)
			}
			if err := r.sound(); err != nil {
				return fmt.Errorf("after going on: %w", err)
			}
			return r.untouched(append([]string{file}, lockNames...)...)
		},
	}
}

// compactGoesOn resumes a run that was interrupted, or gives it up, and then
// begins again where it was given up or has not begun.
func (r *matrixRun) compactGoesOn(image, file string, flags []string) error {
	path := filepath.Join(r.below, image)
	record := filepath.Join(r.below, file+".compact")
	if _, err := os.Stat(record); err == nil {
		how := "--resume"
		if r.n%2 == 1 {
			how = "--abandon"
		}
		if o, err := r.tool("image-compact", path); err != nil || o.exit != 1 {
			return errors.Join(err, fmt.Errorf("begun again in spite of the record: exit %d", o.exit))
		}
		if o, err := r.tool("image-compact", how, path); err != nil || o.exit != 0 {
			return errors.Join(err, fmt.Errorf("%s: exit %d", how, o.exit))
		}
		if _, err := os.Stat(record); err == nil {
			return fmt.Errorf("%s has left the record", how)
		}
	}
	if o, err := r.tool("image-compact", append(flags, path)...); err != nil || o.exit != 0 {
		return errors.Join(err, fmt.Errorf("done again: exit %d", o.exit))
	}
	st, err1 := os.Stat(filepath.Join(r.below, file))
	was, err2 := os.Stat(filepath.Join(r.pristine, file))
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	if st.Size() >= was.Size() && file != "disk.raw" {
		return fmt.Errorf("%d bytes long, and %d before", st.Size(), was.Size())
	}
	return nil
}

// sameDisk compares what the guest and the snapshots see with what they saw.
func (r *matrixRun) sameDisk(file string) error {
	for _, snapshot := range []string{"", "s1"} {
		want, err := viewOf(filepath.Join(r.pristine, file), snapshot)
		if snapshot != "" && err != nil {
			return nil // there is none
		}
		got, err2 := viewOf(filepath.Join(r.below, file), snapshot)
		if err := errors.Join(err, err2); err != nil {
			return err
		}
		if !bytes.Equal(got, want) {
			return fmt.Errorf("the disk (snapshot %q) is not what it was", snapshot)
		}
	}
	return nil
}

func viewOf(path, snapshot string) ([]byte, error) {
	s, err := openStack(path, open.Options{Snapshot: snapshot})
	if err != nil {
		return nil, err
	}
	p := make([]byte, s.Size())
	_, err = s.ReadAt(context.Background(), p, 0)
	return p, errors.Join(err, s.Close())
}

// copies is image-compact --to: the copy is there and right, or it is not
// there.
func copies(name string, setup func(*testing.T, string), image string) row {
	return row{name: name, setup: setup,
		run: func(r *matrixRun) error {
			o, err := r.tool("image-compact", "--json", "--to", filepath.Join(r.dir, "new"), filepath.Join(r.dir, image))
			if r.broken() && o.exit == 0 {
				return err
			}
			return errors.Join(err, r.exits(o, 1))
		},
		judge: func(r *matrixRun) error {
			if _, err := os.Stat(filepath.Join(r.below, "new")); err == nil {
				want, err1 := viewOf(filepath.Join(r.pristine, image), "")
				got, err2 := viewOf(filepath.Join(r.below, "new"), "")
				if err := errors.Join(err1, err2); err != nil || !bytes.Equal(got, want) {
					return errors.Join(errors.New("the copy shows another disk"), err)
				}
				return r.untouched("new")
			}
			if r.said.exit == 0 {
				return errors.New("exit 0, and no copy")
			}
			return r.untouched()
		},
	}
}
