package e2e

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/imgtest"
)

// fsckRows are the commands of image-fsck that make new files beside an image
// that they leave alone.
func fsckRows() []row {
	return []row{
		scavenges("fsck --scavenge, qcow2", "qcow2"),
		scavenges("fsck --scavenge, ploop", "ploop"),
		guestChecks("fsck --guest, clean", false),
		guestChecks("fsck --guest, damaged", true),
		guestChecks("fsck --guest -y, damaged", true, "-y"),
	}
}

// guestDisk is a disk of 1 MiB with an ext2 on all of it.
func guestDisk(t *testing.T, damaged bool) string {
	t.Helper()
	imgtest.Require(t, "mkfs.ext2", "debugfs", "e2fsck")
	dir := t.TempDir()
	raw, files := filepath.Join(dir, "raw"), filepath.Join(dir, "files")
	if err := os.Mkdir(files, 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		if err := os.WriteFile(filepath.Join(files, string(rune('a'+i))), imgtest.PatternBytes(uint64(i), 0, 20000*i), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	imgtest.Run(t, "mkfs.ext2", "-q", "-F", "-b", "1024", "-d", files, raw, "1M")
	if damaged {
		imgtest.Run(t, "debugfs", "-w", "-R", "freeb 40 100", raw)
	}
	return raw
}

// scavenges is image-fsck --scavenge of an image whose map is gone: the new
// image is there and right, or it is not there.
func scavenges(name, format string) row {
	image := imageOf(format)
	var want []byte // of the run without a fault, which is the first
	return row{name: name,
		setup: func(t *testing.T, dir string) {
			raw, path := guestDisk(t, false), filepath.Join(dir, image)
			if format == "qcow2" {
				imgtest.QemuImg(t, "convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4096", raw, path)
				head := readRange(t, path, 0, 48)
				writeRange(t, path, int64(binary.BigEndian.Uint64(head[40:])), make([]byte, 16))
				return
			}
			imgtest.QemuImg(t, "convert", "-f", "raw", "-O", "parallels", "-o", "cluster_size=32768", raw, path)
			writeRange(t, path, 64, make([]byte, 4*32))
		},
		run: func(r *matrixRun) error {
			o, err := r.tool("image-fsck", "--scavenge", filepath.Join(r.dir, "new"), "--format", format, filepath.Join(r.dir, image))
			if r.broken() && o.exit&fsck.ExitUncorrected != 0 && strings.Contains(o.stdout+o.stderr, "could not be read") {
				return errors.Join(err, r.explains(o.stdout+o.stderr)) // it is as good as lost, and it says so
			}
			return errors.Join(err, r.exits(o, fsck.ExitOperational))
		},
		judge: func(r *matrixRun) error {
			now, err := files(r.below)
			if err != nil {
				return err
			}
			var own []string
			for name := range now {
				if strings.HasPrefix(name, "new") {
					own = append(own, name)
				}
			}
			if err := r.soonUntouched(own...); err != nil {
				return err
			}
			_, made := now["new"]
			switch {
			case r.said.exit < 0: // killed
			case made && r.said.exit == fsck.ExitOperational && strings.Contains(r.said.stderr, "new is complete"):
				// Its name may not last: the directory could not be synced.
			case made != (r.said.exit&fsck.ExitCorrected != 0):
				return fmt.Errorf("exit %d, a new image: %v", r.said.exit, made)
			case !made && len(own) > 0:
				return fmt.Errorf("exit %d, and %q are left", r.said.exit, own)
			}
			if !made {
				return nil
			}
			got, err := diskOf(filepath.Join(r.below, "new"), format)
			switch {
			case err != nil:
				return err
			case r.mode == modeNone:
				want = got
			case len(got) != len(want):
				return fmt.Errorf("a disk of %d bytes, want %d", len(got), len(want))
			case !strings.Contains(r.said.stdout, "could not be read") && !bytes.Equal(got, want):
				return errors.New("the new image shows another disk than without a fault")
			}
			// What could not be read is zeros, and nothing else.
			for i := 0; i < len(got); i += sector {
				if p := got[i : i+sector]; !bytes.Equal(p, want[i:i+sector]) && !bytes.Equal(p, make([]byte, sector)) {
					return fmt.Errorf("byte %#x of the disk is made up", i)
				}
			}
			return nil
		},
	}
}

// guestChecks is image-fsck --guest: the image is never changed; with -y a new top
// layer is there when it has succeeded, and else not.
func guestChecks(name string, damaged bool, flags ...string) row {
	const image, top = "top.qcow2", "top.qcow2.guest.qcow2"
	return row{name: name,
		setup: func(t *testing.T, dir string) {
			imgtest.QemuImg(t, "convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4096", guestDisk(t, damaged), filepath.Join(dir, image))
		},
		run: func(r *matrixRun) error {
			o, err := r.tool("image-fsck", append(append([]string{"--guest"}, flags...), filepath.Join(r.dir, image))...)
			said := o.stdout + o.stderr // of the checker, too, which knows no files
			if r.broken() && o.exit&fsck.ExitOperational != 0 && (strings.Contains(said, "Input/output error") || strings.Contains(said, "No space left")) {
				return err
			}
			return errors.Join(err, r.exits(o, fsck.ExitOperational))
		},
		judge: func(r *matrixRun) error {
			if err := r.soonUntouched(top); err != nil {
				return err
			}
			now, err := files(r.below)
			for try := 0; errors.Is(err, os.ErrNotExist) && try < 100; try++ { // removed while we look
				now, err = files(r.below)
			}
			if err != nil {
				return err
			}
			_, ok := now[top]
			switch {
			case ok && len(flags) == 0:
				return errors.New("a new top layer without -y")
			case !ok && r.said.exit == fsck.ExitCorrected:
				return errors.New("repaired, and where?")
			case !ok || r.mode == modeKill:
				return nil
			}
			o, err := r.tool("image-fsck", "--guest", filepath.Join(r.below, top))
			if err == nil && (o.exit != 0) == (r.said.exit == fsck.ExitCorrected) {
				err = fmt.Errorf("exit %d, and then %d of the new top layer", r.said.exit, o.exit)
			}
			return err
		},
	}
}
