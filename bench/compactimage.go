package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
)

// agedRecipe says how a guest is made.
type agedRecipe struct {
	Size   int64 `json:"size"` // of the disk
	Files  int   `json:"files"`
	Delete int   `json:"deleted_percent"`
}

// aged is a guest that has lived, and what it holds.
type aged struct {
	raw   string // file
	files map[string][32]byte
}

const agedSeed = 0xa6ed

// makeAged makes an ext4 through a loop device, fills it with files of 4 to 20
// KiB, and deletes some, without discards.
func (b *compactBench) makeAged(ctx context.Context, r agedRecipe) (*aged, error) {
	a := &aged{raw: filepath.Join(b.dir, "guest.raw"), files: map[string][32]byte{}}
	f, err := os.Create(a.raw)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(f.Truncate(r.Size), f.Close()); err != nil {
		return nil, err
	}
	if err := command(ctx, "mkfs.ext4", "-q", "-F", "-E", "nodiscard", a.raw); err != nil {
		return nil, err
	}
	err = b.mounted(ctx, a.raw, "", func(dir string) error {
		rng := rand.New(rand.NewPCG(agedSeed, 1))
		for n := range r.Files {
			if n%500 == 0 {
				if err := errors.Join(ctx.Err(), os.Mkdir(filepath.Join(dir, fmt.Sprintf("d%d", n/500)), 0o755)); err != nil {
					return err
				}
			}
			if err := a.write(dir, n, 4096+rng.IntN(16<<10)); err != nil {
				return err
			}
		}
		// On the disk before they go: else they would never have been there.
		if err := command(ctx, "sync", "-f", dir); err != nil {
			return err
		}
		// Two of five directories as a whole, and of the others as many files
		// as are missing: some clusters become free, most only emptier.
		const whole = 40
		for n := range r.Files {
			if n/500%5 < 2 || rng.IntN(100-whole) < r.Delete-whole {
				if err := a.remove(dir, n); err != nil {
					return err
				}
			}
		}
		return nil
	})
	return a, err
}

func agedName(n int) string { return fmt.Sprintf("d%d/f%d", n/500, n) }

// write makes file n with size bytes of its own.
func (a *aged) write(dir string, n, size int) error {
	p := make([]byte, size&^7)
	fill(p, agedSeed+uint64(n), 0)
	a.files[agedName(n)] = sha256.Sum256(p)
	return os.WriteFile(filepath.Join(dir, agedName(n)), p, 0o644)
}

func (a *aged) remove(dir string, n int) error {
	delete(a.files, agedName(n))
	return os.Remove(filepath.Join(dir, agedName(n)))
}

// check compares all files below dir with what they should be.
func (a *aged) check(dir string) error {
	found := 0
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		p, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if want, ok := a.files[name]; !ok || sha256.Sum256(p) != want {
			return fmt.Errorf("%s does not hold what it should", name)
		}
		found++
		return nil
	})
	if err == nil && found != len(a.files) {
		err = fmt.Errorf("%d files, want %d", found, len(a.files))
	}
	return err
}

// mounted mounts the ext4 in file through the kernel while do runs.
func (b *compactBench) mounted(ctx context.Context, file, options string, do func(dir string) error) error {
	dir, err := os.MkdirTemp(b.dir, "guest-")
	if err != nil {
		return err
	}
	args := []string{"-o", strings.TrimSuffix("loop,"+options, ","), file, dir}
	if err := command(ctx, "mount", args...); err != nil {
		return errors.Join(err, os.Remove(dir))
	}
	umount := b.cleanup.add(func() error {
		err := command(context.Background(), "umount", dir)
		if err != nil {
			err = errors.Join(err, command(context.Background(), "umount", "-l", dir))
		}
		return errors.Join(err, os.Remove(dir))
	})
	return errors.Join(do(dir), umount())
}

// convertFrom makes an image of a raw file, durable.
func (b *compactBench) convertFrom(ctx context.Context, raw, image, format string) error {
	if err := command(ctx, "qemu-img", "convert", "-f", "raw", "-O", format, raw, image); err != nil {
		return err
	}
	return syncAll([]string{image})
}

// reference is the storage that an image takes that was made of the guest
// after the kernel's fstrim.
func (b *compactBench) reference(ctx context.Context, guest *aged, format string) (int64, error) {
	raw, image := filepath.Join(b.dir, "trimmed.raw"), filepath.Join(b.dir, "trimmed."+format)
	if err := command(ctx, "cp", "--sparse=auto", "--reflink=auto", guest.raw, raw); err != nil {
		return 0, err
	}
	defer os.Remove(raw)
	defer os.Remove(image)
	if err := b.mounted(ctx, raw, "", func(dir string) error { return command(ctx, "fstrim", dir) }); err != nil {
		return 0, err
	}
	if err := b.convertFrom(ctx, raw, image, format); err != nil {
		return 0, err
	}
	var s compactSample
	err := s.sizes(image)
	return s.Allocated, err
}

// verify looks at what a side has made, with the eyes of others.
func (b *compactBench) verify(ctx context.Context, image string, c compactCase) error {
	if err := command(ctx, "qemu-img", "check", "-f", c.Format, image); err != nil {
		return err
	}
	raw := filepath.Join(b.dir, "verify.raw")
	defer os.Remove(raw)
	if err := command(ctx, "qemu-img", "convert", "-f", c.Format, "-O", "raw", image, raw); err != nil {
		return err
	}
	if err := command(ctx, "e2fsck", "-fn", raw); err != nil {
		return err
	}
	return b.mounted(ctx, raw, "ro", c.guest.check)
}

// changeLittle compacts the image, then writes and deletes a few files in it
// through mount-image, without discards. It returns what the guest then holds;
// its raw file is the image's disk.
func (b *compactBench) changeLittle(ctx context.Context, image string, guest *aged) (*aged, error) {
	if err := command(ctx, filepath.Join(b.tools, "image-compact"), image); err != nil {
		return nil, err
	}
	changed := &aged{raw: filepath.Join(b.dir, "changed.raw"), files: maps.Clone(guest.files)}
	dir := filepath.Join(b.dir, "mount")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	tool := filepath.Join(b.tools, "mount-image")
	if err := command(ctx, tool, "-w", image, dir); err != nil {
		return nil, err
	}
	unmount := b.cleanup.add(func() error { return command(context.Background(), tool, "-u", dir) })
	err := b.mounted(ctx, filepath.Join(dir, "disk.raw"), "", func(dir string) error {
		const some = 200
		for n := range some {
			if err := changed.write(dir, n, 16<<10); err != nil {
				return err
			}
		}
		if err := command(ctx, "sync", "-f", dir); err != nil {
			return err
		}
		for n := range some / 2 {
			if err := changed.remove(dir, n); err != nil {
				return err
			}
		}
		return nil
	})
	if err := errors.Join(err, unmount()); err != nil {
		return nil, err
	}
	format := strings.TrimPrefix(filepath.Ext(image), ".")
	return changed, command(ctx, "qemu-img", "convert", "-f", format, "-O", "raw", image, changed.raw)
}

// largeResult is a run on a very large disk.
type largeResult struct {
	Size    int64   `json:"size"`
	RSS     int64   `json:"peak_rss"`
	Seconds float64 `json:"seconds"`
}

// largeDisk measures the memory for an ext4 as large as they get with blocks of
// 4 KiB and 32-bit numbers (quick: smaller).
func (b *compactBench) largeDisk(ctx context.Context, quick bool) (*largeResult, error) {
	res := &largeResult{Size: 16 << 40}
	if quick {
		res.Size = 1 << 40
	}
	b.say("a disk of %d TiB", res.Size>>40)
	work := filepath.Join(b.dir, "large")
	dir := filepath.Join(b.dir, "mount")
	if err := errors.Join(os.MkdirAll(work, 0o755), os.MkdirAll(dir, 0o755)); err != nil {
		return nil, err
	}
	image := filepath.Join(work, "large.qcow2")
	defer os.RemoveAll(work)
	if err := command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", image, fmt.Sprint(res.Size)); err != nil {
		return nil, err
	}
	tool := filepath.Join(b.tools, "mount-image")
	if err := command(ctx, tool, "-w", image, dir); err != nil {
		return nil, err
	}
	unmount := b.cleanup.add(func() error { return command(context.Background(), tool, "-u", dir) })
	err := command(ctx, "mkfs.ext4", "-q", "-F", "-O", "64bit", "-J", "size=64", "-E", "nodiscard", filepath.Join(dir, "disk.raw"))
	if err := errors.Join(err, unmount()); err != nil {
		return nil, err
	}
	s, err := b.timed(ctx, work, filepath.Join(b.tools, "image-compact"), "--json", image)
	res.RSS, res.Seconds = s.RSS, s.Seconds
	return res, err
}
