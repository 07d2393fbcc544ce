package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Names of the images; every one but deep shows the same disk.
const (
	imgBase    = "raw"     // the bare file
	imgQcow2   = "qcow2"   // 64 KiB clusters
	imgPloop   = "ploop"   // 1 MiB clusters, a single image
	imgChain8  = "chain8"  // qcow2, the data spread over eight layers
	imgChain64 = "chain64" // the same over 64
	imgZstd    = "zstd"    // qcow2, compressed
	imgDeflate = "deflate" // qcow2, compressed
	imgDeep    = "deep"    // qcow2, 50 TiB in 64 layers, nearly empty
	imgFlat    = "flat"    // chain8 on a filesystem with reflinks, shown with --flat
)

const (
	contentSeed   = 0x1a6e57ac
	chainRun      = 256 << 10 // data changes layer after so many bytes
	maxPacked     = 1 << 30   // compressing takes long: no larger than this
	deepSize      = 50 << 40
	deepLayers    = 64
	deepFirstByte = 0x5a
)

// image is a stack of files.
type image struct {
	name    string
	format  string   // raw, qcow2, parallels: as qemu-img calls it
	layers  []string // files, top first, all of the format
	size    int64    // of the disk
	content content
	used    bool         // written to by a workload: the content is not known any more
	end     func() error // takes away what holds the files, nil if they are to be removed
}

func (i *image) top() string { return i.layers[0] }

// cluster is the cluster size of an image of the format.
func cluster(format string) int64 {
	if format == "parallels" {
		return 1 << 20
	}
	return 64 << 10
}

// imageStore builds images when they are asked for, from seeded content, with
// qemu-img: neutral ground, and images as users have them.
type imageStore struct {
	dir     string
	size    int64
	built   map[string]*image
	cleanup *cleaner
	say     func(format string, args ...any)
	sums    map[string]string // expected SHA-256 by image name
}

// get returns an image, built by now. key tells copies of one image apart, so
// that every writer has its own; "" is the common one.
func (s *imageStore) get(ctx context.Context, name, key string) (*image, error) {
	id := name
	if key != "" {
		id += "-" + key
	}
	if img, ok := s.built[id]; ok && !(key == "" && img.used) {
		return img, nil
	}
	s.say("building %s", id)
	var img *image
	var err error
	if key == "" {
		img, err = s.build(ctx, name)
	} else {
		img, err = s.copy(ctx, name, id)
	}
	if err != nil {
		return nil, fmt.Errorf("building %s: %w", id, err)
	}
	s.built[id] = img
	return img, nil
}

func (s *imageStore) path(name string) string { return filepath.Join(s.dir, name) }

func (s *imageStore) build(ctx context.Context, name string) (*image, error) {
	img := &image{name: name, format: "qcow2", size: s.size, content: content{size: s.size, seed: contentSeed}}
	var err error
	switch name {
	case imgBase:
		img.format, img.layers = "raw", []string{s.path("base.raw")}
		err = img.content.writeTo(img.top(), 1<<20, func(int64) bool { return true })
	case imgQcow2:
		img.layers = []string{s.path("disk.qcow2")}
		err = s.convert(ctx, img, "-O", "qcow2", "-o", "cluster_size=64k")
	case imgPloop:
		img.format, img.layers = "parallels", []string{s.path("disk.hds")}
		err = s.convert(ctx, img, "-O", "parallels", "-o", "cluster_size=1M")
	case imgZstd, imgDeflate:
		img.size = min(s.size, maxPacked)
		img.content.size = img.size
		img.layers = []string{s.path(name + ".qcow2")}
		typ := map[string]string{imgZstd: "zstd", imgDeflate: "zlib"}[name]
		err = s.convert(ctx, img, "-c", "-O", "qcow2", "-o", "cluster_size=64k,compression_type="+typ)
	case imgChain8:
		err = s.chain(ctx, img, 8)
	case imgChain64:
		err = s.chain(ctx, img, 64)
	case imgDeep:
		err = s.deep(ctx, img)
	case imgFlat:
		err = s.flat(ctx, img)
	default:
		err = fmt.Errorf("no recipe for %q", name)
	}
	if err != nil {
		return nil, err
	}
	return img, syncAll(img.layers)
}

// convert makes the only layer of img out of the base.
func (s *imageStore) convert(ctx context.Context, img *image, args ...string) error {
	base, err := s.get(ctx, imgBase, "")
	if err != nil {
		return err
	}
	source := fmt.Sprintf("driver=raw,size=%d,file.driver=file,file.filename=%s", img.size, base.top())
	args = append([]string{"convert", "--image-opts"}, args...)
	return command(ctx, "qemu-img", append(args, source, img.top())...)
}

// layerOf says which layer, counted from the base, holds run n of a chain.
func layerOf(n int64, depth int) int { return int(mix(uint64(n)^0xcafe) % uint64(depth)) }

// chain spreads the data over layers, so that neighbouring runs lie in
// different ones and every layer holds about as much.
func (s *imageStore) chain(ctx context.Context, img *image, depth int) error {
	part := s.path("part.raw")
	defer os.Remove(part)
	for i := range depth {
		layer := s.path(fmt.Sprintf("%s-%02d.qcow2", img.name, i))
		err := img.content.writeTo(part, chainRun, func(n int64) bool { return layerOf(n, depth) == i })
		if err != nil {
			return err
		}
		if err := command(ctx, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=64k", part, layer); err != nil {
			return err
		}
		if i > 0 {
			if err := command(ctx, "qemu-img", "rebase", "-u", "-f", "qcow2", "-b", filepath.Base(img.top()), "-F", "qcow2", layer); err != nil {
				return err
			}
		}
		img.layers = append([]string{layer}, img.layers...)
	}
	return nil
}

// deep makes a large stack with a few clusters of data in each layer; the
// first bytes of the disk lie in the lowest one.
func (s *imageStore) deep(ctx context.Context, img *image) error {
	img.size, img.content = deepSize, content{}
	for i := range deepLayers {
		layer := s.path(fmt.Sprintf("%s-%02d.qcow2", img.name, i))
		args := []string{"create", "-q", "-f", "qcow2"}
		if i > 0 {
			args = append(args, "-b", filepath.Base(img.top()), "-F", "qcow2")
		}
		if err := command(ctx, "qemu-img", append(args, layer, fmt.Sprint(int64(deepSize)))...); err != nil {
			return err
		}
		// 700 GiB apart, so that each layer has L1 and L2 tables of its own.
		write := fmt.Sprintf("write -P %d %dG 64k", deepFirstByte, i*700)
		if err := command(ctx, "qemu-io", "-f", "qcow2", "-c", write, layer); err != nil {
			return err
		}
		img.layers = append([]string{layer}, img.layers...)
	}
	return nil
}

// copy makes a second image with the same layout.
func (s *imageStore) copy(ctx context.Context, name, id string) (*image, error) {
	from, err := s.get(ctx, name, "")
	if err != nil {
		return nil, err
	}
	if len(from.layers) != 1 {
		return nil, errors.New("only single images are copied")
	}
	img := *from
	img.layers = []string{s.path(id + filepath.Ext(from.top()))}
	if err := copyFile(img.top(), from.top()); err != nil {
		return nil, err
	}
	return &img, syncAll(img.layers)
}

// fresh makes an empty image of the size of img: nothing is mapped.
func (s *imageStore) fresh(ctx context.Context, img *image, key string) (*image, error) {
	n := &image{name: img.name, format: img.format, size: img.size, content: content{size: img.size, zero: true}}
	n.layers = []string{s.path("fresh-" + key + filepath.Ext(img.top()))}
	if err := os.Remove(n.top()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if img.format == "raw" {
		f, err := os.Create(n.top())
		if err != nil {
			return nil, err
		}
		return n, errors.Join(f.Truncate(img.size), f.Close())
	}
	option := fmt.Sprintf("cluster_size=%d", cluster(img.format))
	return n, command(ctx, "qemu-img", "create", "-q", "-f", img.format, "-o", option, n.top(), fmt.Sprint(img.size))
}

// overlay puts an empty qcow2 layer on img.
func (s *imageStore) overlay(ctx context.Context, img *image, key string) (*image, error) {
	n := *img
	n.layers = append([]string{s.path("overlay-" + key + ".qcow2")}, img.layers...)
	if err := os.Remove(n.top()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	return &n, command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-b", filepath.Base(img.top()), "-F", img.format, n.top())
}

// sum is the SHA-256 that the disk must show.
func (s *imageStore) sum(img *image) string {
	if img.content.zero || len(img.content.patches) > 0 {
		return img.content.sum()
	}
	key := fmt.Sprint(img.content.seed, img.content.size)
	if s.sums == nil {
		s.sums = map[string]string{}
	}
	if s.sums[key] == "" {
		s.sums[key] = img.content.sum()
	}
	return s.sums[key]
}

// drop deletes the files of an image, of its copies, and of what was put on it.
func (s *imageStore) drop(name string) error {
	var errs error
	for id, img := range s.built {
		if id != name && !strings.HasPrefix(id, name+"-") {
			continue
		}
		for _, l := range img.layers {
			errs = errors.Join(errs, os.Remove(l))
		}
		if img.end != nil {
			errs = errors.Join(errs, img.end())
		}
		delete(s.built, id)
	}
	return errs
}

// need is the most space that the images take at one time, for the check
// before the run: the base, one image, a copy for each of three writers, and a
// fresh image that is being filled.
func (s *imageStore) need() int64 { return 6*s.size + s.size/4 + 1<<30 }

func copyFile(to, from string) error {
	r, err := os.Open(from)
	if err != nil {
		return err
	}
	defer r.Close()
	w, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.Copy(w, r)
	return errors.Join(err, w.Close())
}

// syncAll makes files durable, so that nothing is written back during a run
// and that their pages can be dropped.
func syncAll(paths []string) error {
	for _, p := range paths {
		f, err := os.OpenFile(p, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// command runs a helper and fails with what it said.
func command(ctx context.Context, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	detach(cmd)
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, lastLines(string(out), 3))
	}
	return nil
}
