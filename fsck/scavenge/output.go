package scavenge

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/ploop"
	"github.com/imagestack/imagestack/layers/qcow2"
	"github.com/imagestack/imagestack/layers/raw"
)

func lostName(name string) string { return name + ".lost+found" }

// partName is what the new image is called until it is complete.
func partName(name string) string { return name + ".incomplete" }

// sink takes content of the disk.
type sink interface {
	write(guest int64, p []byte) error
	// zeros is write of zeros, in the length of p, which it may use.
	zeros(guest int64, p []byte) error
	zero(guest, n int64) error
	unreadable(guest, n int64) error
}

// imageSink writes into the new image.
type imageSink struct {
	ctx   context.Context // of the one run
	ed    layers.Editor
	rep   *Report
	below layers.Below
	keep  bool // zeros are written too: something may shine through
	done  int64
}

// nothingBelow stands for the layers under the new image. What they hold is
// not known here, so that nothing may have to be completed from them.
type nothingBelow struct{ parent, strict bool }

func (b nothingBelow) ReadAt(_ context.Context, p []byte, off int64) error {
	if b.strict {
		return fmt.Errorf("%w: disk offset %d has to be completed from the backing file", layers.ErrUnsupported, off)
	}
	clear(p)
	return nil
}

func (b nothingBelow) IsZero(context.Context, int64, int64) (bool, error) { return !b.parent, nil }

func (s *imageSink) clip(guest, n int64) int64 { return max(min(n, s.ed.Size()-guest), 0) }

func (s *imageSink) write(guest int64, p []byte) error {
	n := s.clip(guest, int64(len(p)))
	if n == 0 {
		return nil // behind the end of the disk: VM state, or the rest of a cluster
	}
	s.done += n
	if !s.keep && backend.IsZero(p[:n]) {
		return nil
	}
	return s.ed.WriteAt(s.ctx, p[:n], guest, s.below)
}

func (s *imageSink) zeros(guest int64, p []byte) error {
	if !s.keep {
		s.done += s.clip(guest, int64(len(p)))
		return nil
	}
	clear(p)
	return s.write(guest, p)
}

func (s *imageSink) zero(guest, n int64) error {
	if n = s.clip(guest, n); n == 0 || !s.keep {
		return nil
	}
	return s.ed.ZeroAt(s.ctx, guest, n, false, s.below)
}

func (s *imageSink) unreadable(guest, n int64) error {
	if n = s.clip(guest, n); n > 0 {
		s.rep.Unreadable = addRange(s.rep.Unreadable, blockmap.Range{Off: guest, Len: n})
	}
	return nil
}

// fileSink writes into a sparse file.
type fileSink struct{ f backend.File }

func (s fileSink) write(at int64, p []byte) error {
	if backend.IsZero(p) {
		return nil
	}
	_, err := s.f.WriteAt(p, at)
	return err
}

func (fileSink) zeros(int64, []byte) error     { return nil }
func (fileSink) zero(int64, int64) error       { return nil }
func (fileSink) unreadable(int64, int64) error { return nil }

// createImage makes the empty image of format to in f and opens it.
func createImage(ctx context.Context, f backend.File, to string, o qcow2.CreateOptions, size int64) (layers.Editor, error) {
	var err error
	lo := layers.OpenOptions{Path: f.Name(), Writable: true, Cache: layers.NewCache(32 << 20)}
	switch to {
	case "qcow2":
		if err = qcow2.Create(ctx, f, o); err == nil {
			return qcow2.Open(ctx, f, lo)
		}
	case "ploop":
		po := ploop.CreateOptions{Size: size, ClusterSize: max(o.ClusterSize, ploop.MinCluster)}
		if o.Version == 1 {
			po.Version = 1
		}
		if err = ploop.Create(ctx, f, po); err == nil {
			return ploop.Open(ctx, f, lo)
		}
	case "raw":
		if err = raw.Create(ctx, f, size); err == nil {
			return raw.Open(ctx, f, lo)
		}
	default:
		err = fmt.Errorf("%w: new format %s", layers.ErrUnsupported, to)
	}
	return nil, err
}

// order lists the pieces that have a place, by place.
func (p *pieces) order() []int32 {
	var out []int32
	for i, u := range p.place {
		if u >= 0 {
			out = append(out, int32(i))
		}
	}
	slices.SortFunc(out, func(a, b int32) int { return cmp.Compare(p.place[a], p.place[b]) })
	return out
}

// finish writes what was found, and the report.
func (j *job) finish(ctx context.Context) (err error) {
	if err := j.src.take(int64(len(j.p.place))*4, "the order of the clusters"); err != nil {
		return err
	}
	order := j.p.order()
	j.diskSize(order)
	j.rep.ClusterSize = int64(1) << j.ev.shift
	for _, g := range j.ev.guests {
		f := Filesystem{Type: g.kind, UUID: uuidText(g.uuid), Size: g.size, Basis: g.basis, Blocks: g.blocks}
		if g.rank != rankNone {
			f.Base = &g.base
		}
		j.rep.Filesystems = append(j.rep.Filesystems, f)
	}
	for i := range j.p.place {
		if !j.p.idle.get(int64(i)) {
			j.rep.Pieces++
		}
	}
	j.lost = &lostAndFound{dir: lostName(j.name), rep: j.rep}
	defer func() {
		if err != nil && j.rep.New == "" {
			err = errors.Join(err, j.lost.remove())
		}
	}()
	if len(order) == 0 {
		// The source still has everything: copies of all of it would help nobody.
		j.lost.listOnly = true
	}
	if err := j.im.leftovers(ctx); err != nil {
		return err
	}
	// Before the new image has its name: after an error there is none. (But for
	// an error that comes when it has its name: then both stay.)
	if err := j.lost.close(); err != nil {
		return err
	}
	if len(order) > 0 {
		if err := j.writeNew(ctx, order); err != nil {
			return err
		}
	}
	j.unknown(order)
	r := j.rep
	if r.New != "" {
		r.Exit |= fsck.ExitCorrected
	}
	if r.New == "" || r.UnplacedBytes > 0 || len(r.Unreadable) > 0 || r.GuessedBytes > 0 || j.src.bad > 0 {
		r.Exit |= fsck.ExitUncorrected
	}
	return nil
}

// diskSize settles how long the disk is.
func (j *job) diskSize(order []int32) {
	r := j.rep
	if r.VirtualSize = j.size; r.VirtualSize > 0 {
		return
	}
	from := "partition table"
	r.VirtualSize = j.sol.disk
	if r.VirtualSize == 0 {
		from = "end of what was found; it may have been longer"
		for _, g := range j.ev.guests {
			if g.rank != rankNone {
				r.VirtualSize = max(r.VirtualSize, g.base+g.size)
			}
		}
		if n := len(order); n > 0 {
			r.VirtualSize = max(r.VirtualSize, (int64(j.p.place[order[n-1]])+1)*j.p.unit)
		}
	}
	r.Geometry["virtual-size"] = from
}

// writeNew writes the new image under another name, and names it when it is
// complete.
func (j *job) writeNew(ctx context.Context, order []int32) (err error) {
	part := partName(j.name)
	f, err := backend.Open(part, backend.Options{Writable: true, Create: true, Exclusive: true})
	if err != nil {
		return err
	}
	defer func() {
		if err != nil && j.rep.New == "" {
			err = errors.Join(err, os.Remove(part))
		}
	}()
	ed, err := j.im.create(ctx, f, j.o.To)
	if err != nil {
		return errors.Join(err, f.Close())
	}
	parent := j.parent()
	s := &imageSink{ctx: ctx, ed: ed, rep: j.rep, below: nothingBelow{parent, parent && j.o.To == "qcow2"}, keep: parent}
	for i, piece := range order {
		if err = ctx.Err(); err != nil {
			err = context.Cause(ctx)
			break
		}
		before := s.done
		at := int64(j.p.place[piece]) * j.p.unit
		if err = j.im.content(ctx, piece, at, s); err != nil {
			break
		}
		proof := j.p.proof(piece)
		j.rep.Placed[proof]++
		j.rep.PlacedBytes += s.done - before
		if proof == GuessRun {
			j.rep.GuessedBytes += s.done - before
		}
		j.rep.place(Place{Guest: at, Length: j.p.unit, Host: j.host(piece), Proof: proof, Votes: int64(j.p.votes[piece])})
		if j.o.OnProgress != nil {
			j.o.OnProgress("new image", int64(i+1), int64(len(order)))
		}
	}
	if err == nil {
		err = ed.Sync(ctx)
	}
	if err = errors.Join(err, ed.Close()); err != nil {
		return err
	}
	// It never replaces a file that has come into being meanwhile.
	linked := false
	if err = unix.Renameat2(unix.AT_FDCWD, part, unix.AT_FDCWD, j.name, unix.RENAME_NOREPLACE); errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		err = os.Link(part, j.name)
		linked = err == nil
	}
	if err != nil {
		return fmt.Errorf("%s: %w", j.name, err)
	}
	j.rep.New = j.name
	if linked {
		if err := os.Remove(part); err != nil {
			return err
		}
	}
	return syncName(j.name)
}

// syncName makes the name of the new image durable; tests let it fail.
var syncName = backend.SyncName

// parent tells whether something may lie under the image.
func (j *job) parent() bool {
	if q, ok := j.im.(*qcow2Job); ok {
		return q.backing != "" && q.backFmt != ""
	}
	return j.o.To == "ploop" // a delta may have a parent
}

// host is where a piece begins in the file.
func (j *job) host(piece int32) int64 {
	switch im := j.im.(type) {
	case *qcow2Job:
		return im.tables[piece].host
	case *ploopJob:
		return im.host(piece)
	}
	return 0
}

// unknown lists the places of the disk of which nothing is known: as long as
// something has no place, all that nothing was placed at.
func (j *job) unknown(order []int32) {
	if j.rep.UnplacedBytes == 0 && len(order) > 0 {
		return
	}
	add := func(from, to int64) {
		to = min(to, j.rep.VirtualSize)
		if from < to {
			j.rep.UnknownBytes += to - from
			j.rep.Unknown = addRange(j.rep.Unknown, blockmap.Range{Off: from, Len: to - from})
		}
	}
	at := int64(0)
	for _, piece := range order {
		u := int64(j.p.place[piece]) * j.p.unit
		add(at, u)
		at = u + j.p.unit
	}
	add(at, j.rep.VirtualSize)
}

// keep reports something without a place and, unless copies are not wanted,
// stores it in the lost+found directory.
func (j *job) keep(u Unplaced, file string, fill func(f backend.File) error) error {
	j.rep.UnplacedBytes += u.Length
	return j.lost.add(u, file, fill)
}

// loose reports the runs of clusters for which why gives a reason.
func (j *job) loose(ctx context.Context, n, first, size int64, why func(c int64) string) error {
	for c := int64(0); c < n; {
		reason := why(c)
		if reason == "" {
			c++
			continue
		}
		k := c + 1
		for k < n && (k-c)*size < 1<<30 && why(k) == reason {
			k++
		}
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		host, length := first+c*size, (k-c)*size
		err := j.keep(Unplaced{Host: host, Length: length, Why: reason}, fmt.Sprintf("host-%#x.raw", host), func(f backend.File) error {
			return j.src.copyTo(ctx, f, host, length)
		})
		if err != nil {
			return err
		}
		c = k
	}
	return nil
}

// copyTo copies a range of the file, as far as it can be read.
func (s *source) copyTo(ctx context.Context, f backend.File, off, n int64) error {
	if err := f.Truncate(n); err != nil {
		return err
	}
	buf := make([]byte, window)
	for at := int64(0); at < n; at += window {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		b := buf[:min(window, n-at)]
		if !s.read(b, off+at) {
			s.readPieces(b, off+at)
		}
		if backend.IsZero(b) {
			continue
		}
		if _, err := f.WriteAt(b, at); err != nil {
			return err
		}
	}
	return nil
}

// lostAndFound is the directory of what has no place. Its file LIST names
// everything, also where the report has no more room.
type lostAndFound struct {
	dir      string
	rep      *Report
	list     *os.File
	w        *bufio.Writer
	listOnly bool
}

func (l *lostAndFound) add(u Unplaced, name string, fill func(f backend.File) error) (err error) {
	if !l.listOnly {
		if l.list == nil {
			if err := l.open(); err != nil {
				return err
			}
		}
		u.File = name
		f, err := backend.Open(filepath.Join(l.dir, name), backend.Options{Writable: true, Create: true, Exclusive: true})
		if err != nil {
			return err
		}
		if err := errors.Join(fill(f), f.Sync(), f.Close()); err != nil {
			return fmt.Errorf("lost+found: %w", err)
		}
		var at []string
		for _, p := range u.Places {
			at = append(at, fmt.Sprintf("%#x", p))
		}
		if _, err := fmt.Fprintf(l.w, "%#x\t%d\t%s\t%s\t%s\n", u.Host, u.Length, name, u.Why, strings.Join(at, ",")); err != nil {
			return err
		}
	}
	if len(l.rep.Unplaced) < maxListed {
		l.rep.Unplaced = append(l.rep.Unplaced, u)
	}
	return nil
}

func (l *lostAndFound) open() (err error) {
	if err = os.Mkdir(l.dir, 0o700); err != nil {
		return err
	}
	l.rep.LostFound = l.dir
	if l.list, err = os.OpenFile(filepath.Join(l.dir, "LIST"), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
		return err
	}
	l.w = bufio.NewWriter(l.list)
	_, err = l.w.WriteString("# offset in the image\tbytes of content\tfile\treason\tplaces on the disk that were named\n")
	return err
}

func (l *lostAndFound) close() error {
	if l.list == nil {
		return nil
	}
	return errors.Join(l.w.Flush(), l.list.Sync(), l.list.Close(), backend.SyncDir(l.dir), backend.SyncDir(filepath.Dir(l.dir)))
}

func (l *lostAndFound) remove() error {
	if l.rep.LostFound == "" {
		return nil
	}
	_ = l.list.Close() // closed already, or of no use
	return os.RemoveAll(l.dir)
}
