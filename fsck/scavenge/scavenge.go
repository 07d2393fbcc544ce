package scavenge

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/ploop"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// Options say how an image is rebuilt.
type Options struct {
	// Format is qcow2 or ploop; "" takes what the header says.
	Format string
	// To is the format of the new image, "" that of the source.
	To string
	// Size and ClusterSize, in bytes, are for images that do not say them any
	// more, and prevail over what the header says.
	Size, ClusterSize int64
	// Guess also makes guesses, which the report labels.
	Guess bool
	// Memory bounds what is kept of the image, in bytes.
	Memory     int64
	OnProgress func(pass string, done, total int64)
}

// DefaultMemory is the default of Options.Memory.
const DefaultMemory = 256 << 20

// ErrExists says that the new file exists already; it is never overwritten.
var ErrExists = errors.New("the new file exists already")

// Run rebuilds the image at path into the new file at name. The image is
// opened for reading only. When nothing has a proven place no file is made,
// and the report says so; after an error there is none either, unless the error
// is that its name may not be durable.
func Run(ctx context.Context, path, name string, o Options) (_ *Report, err error) {
	for _, n := range []string{name, lostName(name), partName(name)} {
		if _, err := os.Lstat(n); !errors.Is(err, fs.ErrNotExist) {
			if err == nil {
				err = ErrExists
			}
			return nil, fmt.Errorf("%s: %w", n, err)
		}
	}
	f, err := backend.Open(path, backend.Options{})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if l := backend.LockerOf(f); l != nil {
		if err := l.Lock(backend.ReaderUse, backend.ReaderUnshare); err != nil && !errors.Is(err, errors.ErrUnsupported) {
			return nil, err
		}
	}
	rep, err := rebuild(ctx, f, path, name, o)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return rep, nil
}

// image is the part of the work that depends on the format.
type image interface {
	// prepare finds the pieces and what they hold.
	prepare(ctx context.Context) error
	// survivors places what needs no evidence of the guest.
	survivors(ctx context.Context) error
	// content calls emit for all that piece holds, at its bytes of the disk.
	content(ctx context.Context, piece int32, at int64, out sink) error
	// leftovers reports what has no place.
	leftovers(ctx context.Context) error
	// blocks shows the data of a piece: b lies at loc.
	blocks(ctx context.Context, piece int32, visit func(b []byte, loc int64) error) error
	// create makes the new image.
	create(ctx context.Context, f backend.File, to string) (layers.Editor, error)
}

// job is one run.
type job struct {
	src  *source
	o    *Options
	rep  *Report
	ev   *evidence
	p    *pieces
	sol  *solver
	im   image
	name string
	lost *lostAndFound
	size int64 // of the disk, when known from the start
}

func rebuild(ctx context.Context, f backend.File, path, name string, o Options) (*Report, error) {
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if o.Memory <= 0 {
		o.Memory = DefaultMemory
	}
	rep := &Report{Version: ReportVersion, Image: path, Geometry: map[string]string{}, Placed: map[string]int64{},
		Filesystems: []Filesystem{}, Notes: []string{}, Places: []Place{}, Unplaced: []Unplaced{}, Unknown: []fsck.RangeDoc{}, Unreadable: []fsck.RangeDoc{}}
	// A quarter is for buffers and the tables of the new image.
	src := &source{f: f, size: size, left: o.Memory / 4 * 3, progress: o.OnProgress}
	j := &job{src: src, o: &o, rep: rep, name: name, ev: &evidence{src: src, report: rep}}
	head := make([]byte, 64)
	src.read(head, 0)
	if o.Format == "" {
		switch {
		case qcow2.Probe(head):
			o.Format = "qcow2"
		case ploop.Probe(head):
			o.Format = "ploop"
		case src.failed != nil:
			return nil, fmt.Errorf("the header cannot be read: %w (--format says which format it was)", src.failed)
		default:
			return nil, fmt.Errorf("%w: the header is lost: say which format it was (see --format)", layers.ErrFormat)
		}
	}
	switch o.Format {
	case "qcow2":
		j.im = &qcow2Job{job: j, src: src, rep: rep, qcow2Image: &qcow2Image{src: src, rep: rep}}
	case "ploop", "parallels":
		o.Format = "ploop"
		j.im = &ploopJob{job: j}
	default:
		return nil, fmt.Errorf("%w: a %s image has no map", layers.ErrUnsupported, o.Format)
	}
	if o.To == "" {
		o.To = o.Format
	}
	if o.To == "parallels" {
		o.To = "ploop"
	}
	rep.Format, rep.To = o.Format, o.To
	if err := j.im.prepare(ctx); err != nil {
		if src.failed != nil {
			err = fmt.Errorf("%w; the file could not be read: %w", err, src.failed)
		}
		return nil, err
	}
	if err := j.findPlaces(ctx); err != nil {
		return nil, err
	}
	if err := j.finish(ctx); err != nil {
		return nil, err
	}
	if src.failed != nil {
		rep.note("what could not be read counts as lost: " + src.failed.Error())
		rep.Exit |= fsck.ExitUncorrected
	}
	return rep, nil
}

// findPlaces makes the rounds.
func (j *job) findPlaces(ctx context.Context) error {
	if err := j.im.survivors(ctx); err != nil {
		return err
	}
	j.sol = &solver{e: j.ev, p: j.p, disk: j.size}
	for range 8 {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		changed, err := j.sol.bases()
		if err != nil {
			return err
		}
		for _, g := range j.ev.guests {
			if g.rank == rankNone || g.deep {
				continue
			}
			g.deep = true
			switch g.kind {
			case "ext4":
				err = g.ext.trees(j.ev, g, j.fits(g))
			case "xfs":
				err = g.xfs.tails(j.ev, g)
			}
			if err != nil {
				return err
			}
		}
		if changed {
			n, err := j.p.contradicted(j.ev)
			if err != nil {
				return err
			}
			if n > 0 {
				j.rep.note(fmt.Sprintf("%d entries of the map are contradicted by the content", n))
			}
		}
		n, err := j.p.byEvidence(j.ev, ProofGuest)
		if err != nil {
			return err
		}
		if n > 0 || changed {
			continue
		}
		if n, err = j.bitmaps(ctx); err != nil {
			return err
		}
		if n > 0 {
			continue
		}
		if n, err = j.byTails(ctx); err != nil {
			return err
		}
		if n == 0 {
			break
		}
	}
	if j.o.Guess {
		j.p.guess()
	}
	if bad := j.src.bad; bad > 0 {
		j.rep.note(fmt.Sprintf("%d bytes of the file could not be read", bad))
	}
	return nil
}

// bitmaps looks for bitmaps of ext4 in what still has no place, once for each
// filesystem, and reports how many were found.
func (j *job) bitmaps(ctx context.Context) (found int, err error) {
	type one struct {
		g    *guest
		fits func(loc, off int64) bool
	}
	var all []one
	for _, g := range j.ev.guests {
		if g.rank != rankNone && g.ext != nil && !g.mapped && len(g.ext.bitmaps) > 0 {
			g.mapped = true
			g.ext.sortBitmaps()
			all = append(all, one{g, j.fits(g)})
		}
	}
	if len(all) == 0 {
		return 0, nil
	}
	before := len(j.ev.hits)
	for i := range j.p.place {
		if j.p.place[i] >= 0 || j.p.idle.get(int64(i)) {
			continue
		}
		err := j.im.blocks(ctx, int32(i), func(b []byte, loc int64) error {
			for _, o := range all {
				bs := o.g.block
				for x := mod(o.g.base-loc, bs); o.g.phases[0] == mod(o.g.base, bs)&^(alignGuest-1) && x+bs <= int64(len(b)); x += bs {
					if err := o.g.ext.bitmapAt(j.ev, o.g, b[x:x+bs], loc+x, o.fits); err != nil {
						return err
					}
				}
			}
			return nil
		})
		if err != nil {
			return 0, err
		}
		if j.o.OnProgress != nil {
			j.o.OnProgress("bitmaps", int64(i), int64(len(j.p.place)))
		}
	}
	found = len(j.ev.hits) - before
	j.ev.finish()
	return found, nil
}

// fits tells whether the bytes at a loc can be those at off of g.
func (j *job) fits(g *guest) func(loc, off int64) bool {
	var spots []spot
	return func(loc, off int64) bool {
		spots = j.p.spots(loc, spots[:0])
		for _, s := range spots {
			if v := g.base + off - s.rel; v%j.p.unit == 0 && j.p.inDisk(v/j.p.unit) {
				return true
			}
		}
		return false
	}
}

// passes collects the evidence. more shows content that does not lie in the
// file as it is.
func (j *job) passes(ctx context.Context, more func(visit func(b []byte, loc int64) error) error) error {
	both := func(pass string, visit func(b []byte, n int, loc int64) error) error {
		if err := j.src.each(ctx, pass, visit); err != nil || more == nil {
			return err
		}
		return more(func(b []byte, loc int64) error { return visit(b, len(b), loc) })
	}
	if err := both("superblocks", j.ev.supers); err != nil {
		return err
	}
	for _, g := range j.ev.guests {
		if g.ext != nil {
			if err := g.ext.prepare(j.ev); err != nil {
				return err
			}
		}
	}
	if err := both("metadata", j.ev.meta); err != nil {
		return err
	}
	j.ev.finish()
	return nil
}
