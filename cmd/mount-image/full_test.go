package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/internal/imgtest"
)

// A full host disk is ENOSPC for the writer; the mount stays alive, what was
// fsynced stays, and when there is room again writing goes on.
func TestHostDiskFull(t *testing.T) {
	t.Parallel()
	imgtest.RequireRoot(t)
	for format, name := range map[string]string{"raw": "disk.img", "qcow2": "disk.qcow2", "parallels": "disk.hds"} {
		t.Run(format, func(t *testing.T) {
			host := t.TempDir()
			imgtest.Run(t, "mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", host)
			defer imgtest.Umount(t, host)
			path := filepath.Join(host, name)
			imgtest.QemuImg(t, "create", "-q", "-f", format, path, "64M")
			ballast := filepath.Join(host, "ballast")
			if err := os.WriteFile(ballast, make([]byte, 4<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			dir := mountDir(t)
			want(t, 0, "-w", "--format", format, path, dir)
			f, err := os.OpenFile(disk(dir), os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			safe := imgtest.PatternBytes(1, 0, 2<<20)
			if _, err := f.WriteAt(safe, 1<<20); err != nil {
				t.Fatal(err)
			}
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
			var off int64 = 4 << 20
			chunk := imgtest.PatternBytes(2, 0, 1<<20)
			for ; err == nil && off < 60<<20; off += 1 << 20 {
				_, err = f.WriteAt(chunk, off)
			}
			if !errors.Is(err, unix.ENOSPC) {
				t.Fatalf("writing to a full disk, at %d: %v", off, err)
			}
			got := make([]byte, len(safe))
			if _, err := f.ReadAt(got, 1<<20); err != nil || !bytes.Equal(got, safe) {
				t.Errorf("what was safe: %v", err)
			}
			if err := os.Remove(ballast); err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt(chunk, 62<<20); err != nil {
				t.Errorf("with room again: %v", err)
			}
			if err := f.Sync(); err != nil {
				t.Errorf("sync with room again: %v", err)
			}
			_ = f.Close()
			want(t, 0, "-u", dir)
			unmounted(t, dir)
			out := filepath.Join(t.TempDir(), "out")
			imgtest.QemuRaw(t, format, path, out)
			all, err := os.ReadFile(out)
			if err != nil || !bytes.Equal(all[1<<20:3<<20], safe) || !bytes.Equal(all[62<<20:63<<20], chunk) {
				t.Errorf("the image does not hold what was written (%v)", err)
			}
			if format != "raw" {
				if exit, out := imgtest.QemuCheck(t, path, format); exit != 0 && exit != 3 {
					t.Errorf("qemu-img check: %d %s", exit, out)
				}
			}
		})
	}
}

// An image on a block device that is full is ENOSPC as well, although the
// device says something else about its length.
func TestBlockDeviceFull(t *testing.T) {
	t.Parallel()
	imgtest.RequireLoop(t)
	for format, size := range map[string]int64{"qcow2": 4 << 20, "parallels": 5 << 20} {
		t.Run(format, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "device")
			imgtest.QemuImg(t, "create", "-q", "-f", format, file, "64M")
			if err := os.Truncate(file, size); err != nil {
				t.Fatal(err)
			}
			dev := strings.TrimSpace(string(imgtest.Run(t, "losetup", "-f", "--show", file)))
			defer imgtest.Run(t, "losetup", "-d", dev)
			dir := mountDir(t)
			want(t, 0, "-w", "--format", format, dev, dir)
			f, err := os.OpenFile(disk(dir), os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			chunk := imgtest.PatternBytes(2, 0, 1<<20)
			written := int64(0)
			for ; err == nil && written < size+1<<20; written += 1 << 20 {
				_, err = f.WriteAt(chunk, written)
			}
			if !errors.Is(err, unix.ENOSPC) {
				t.Fatalf("writing to a full device, at %d: %v", written, err)
			}
			got := make([]byte, len(chunk))
			if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, chunk) {
				t.Errorf("what was written before: %v", err)
			}
			_ = f.Close()
			want(t, 0, "-u", dir)
		})
	}
}
