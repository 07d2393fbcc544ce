package fsck

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/backend"
)

// UndoOptions change what ApplyUndo insists on.
type UndoOptions struct {
	// Force restores the saved bytes even into an image that is not what the
	// repair left.
	Force bool
}

// UndoResult is what ApplyUndo did.
type UndoResult struct {
	Sections int   // rounds of repair taken back
	Bytes    int64 // restored
	Size     int64 // length of the image now
}

// ApplyUndo restores the image f, which is locked and writable, from an undo
// file, bit for bit and with its length. It checks first, and changes nothing
// when the undo file is damaged (ErrUndo), when the repair had changed nothing
// (ErrNothingToUndo), or when the image is neither what some moment of the
// repair left nor what some moment of an earlier ApplyUndo did (ErrChanged).
// Interrupted anywhere it can be run again.
func ApplyUndo(ctx context.Context, undo, f backend.File, o UndoOptions) (UndoResult, error) {
	var res UndoResult
	sections, err := readSections(undo)
	if err != nil {
		return res, fmt.Errorf("%s: %w", undo.Name(), err)
	}
	if len(sections) == 0 {
		return res, fmt.Errorf("%s: %w", undo.Name(), ErrNothingToUndo)
	}
	if !o.Force {
		if err := verifyUndo(ctx, undo, sections, f); err != nil {
			return res, err
		}
	}
	for _, s := range slices.Backward(sections) {
		size, err := f.Size()
		if err != nil {
			return res, err
		}
		// What the round has cut off becomes a hole first, but for what has a
		// record. (A device has one length, and nothing is cut off.)
		if s.newSize < s.oldSize && size > s.newSize {
			err := f.Truncate(s.newSize)
			if err == nil {
				size = s.newSize
			} else if !errors.Is(err, unix.EINVAL) {
				return res, err
			}
		}
		// Longer first, so that everything has room; shorter last.
		if size < s.oldSize {
			if err := f.Truncate(s.oldSize); err != nil {
				return res, err
			}
		}
		u := newUndoReader(undo, s.off, s.end)
		for {
			if err := ctx.Err(); err != nil {
				return res, context.Cause(ctx)
			}
			r, err := u.next()
			if err != nil {
				return res, err
			}
			if r == nil {
				break
			}
			if err := restore(f, r); err != nil {
				return res, err
			}
			res.Bytes += r.n
		}
		if size > s.oldSize {
			if err := f.Truncate(s.oldSize); err != nil {
				return res, err
			}
		}
		// The next section may only follow when this one is there for good: a
		// state of the image that belongs to no moment could not be verified.
		if err := f.Sync(); err != nil {
			return res, err
		}
		res.Sections++
		res.Size = s.oldSize
	}
	return res, nil
}

// restore puts back one record.
func restore(f backend.File, r *undoRecord) error {
	if r.hole {
		err := f.PunchHole(r.off, r.n)
		if !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
	}
	_, err := f.WriteAt(r.content(), r.off)
	return err
}

// sectorSum is what the first n bytes of a sector may hold.
type sectorSum struct {
	n   int
	crc uint32
}

// verifyUndo checks that the image is what the repair, or taking it back, may
// have left.
func verifyUndo(ctx context.Context, undo backend.File, sections []undoSection, f backend.File) error {
	changed := func(why string, args ...any) error {
		return fmt.Errorf("%s: %w: %s", f.Name(), ErrChanged, fmt.Sprintf(why, args...))
	}
	size, err := f.Size()
	if err != nil {
		return err
	}
	low, high, grown := sections[0].oldSize, sections[0].oldSize, int64(math.MaxInt64)
	for i, s := range sections {
		low, high = min(low, s.newSize), max(high, s.newSize)
		if i > 0 && s.newSize > s.oldSize {
			grown = min(grown, s.oldSize)
		}
	}
	if size < low || size > high {
		return changed("its length is %d", size)
	}
	cursors := make([]*undoReader, len(sections))
	heads := make([]*undoRecord, len(sections))
	advance := func(i int) (err error) {
		if heads[i], err = cursors[i].next(); err == nil && heads[i] != nil {
			// The record is overwritten by the next; the heads of several
			// sections are alive at once, each with a reader of its own.
			heads[i].crcs = slices.Clone(heads[i].crcs)
		}
		return err
	}
	for i, s := range sections {
		cursors[i] = newUndoReader(undo, s.off, s.end)
		if err := advance(i); err != nil {
			return err
		}
	}
	head := make([]byte, min(headSize, sections[0].oldSize))
	if err := readZero(f, head, 0); err != nil {
		return err
	}
	buf := make([]byte, undoBlock)
	holes := holeFinder{f: f}
	// What was cut off and has no record was a hole. Up to checked that is seen
	// to; what a later round has put behind the end that it found is not known.
	checked, rest := int64(0), make([]byte, undoBlock)
	empty := func(to int64) error {
		for _, s := range sections {
			for at, end := max(checked, s.newSize), min(to, s.oldSize, size, grown); at < end; {
				if err := ctx.Err(); err != nil {
					return context.Cause(ctx)
				}
				data, err := holes.next(at)
				if err != nil {
					return err
				}
				if at = max(at, data); at >= end {
					break
				}
				b := rest[:min(undoBlock, end-at)]
				if err := readZero(f, b, at); err != nil {
					return err
				}
				if !backend.IsZero(b) {
					return changed("there are bytes behind %#x, where the repair has left none", at)
				}
				at += int64(len(b))
			}
		}
		checked = max(checked, to)
		return nil
	}
	for {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		// All records of the lowest block that any section has left.
		block, of, several := int64(-1), 0, false
		for i, h := range heads {
			switch {
			case h == nil:
			case block < 0 || h.off/undoBlock < block:
				block, of, several = h.off/undoBlock, i, false
			case h.off/undoBlock == block:
				several = true
			}
		}
		if block < 0 {
			break
		}
		// A hole that nobody has filled needs no sums: there may be terabytes.
		if h := heads[of]; !several && h.hole && len(h.crcs) == 0 && h.off >= int64(len(head)) {
			data, err := holes.next(h.off)
			if err != nil {
				return err
			}
			if data >= h.off+h.n {
				if err := empty(h.off); err != nil {
					return err
				}
				checked = h.off + h.n
				if err := advance(of); err != nil {
					return err
				}
				continue
			}
		}
		known := map[int64][]sectorSum{}
		for i := len(sections) - 1; i >= 0; i-- {
			for heads[i] != nil && heads[i].off/undoBlock == block {
				h := heads[i]
				n := h.sectors()
				content := h.content()
				for k := range n {
					at := h.off + int64(k)*sector
					part := content[k*sector : min((k+1)*sector, len(content))]
					known[at] = append(known[at], sectorSum{len(part), crcOf(part)})
					for j := k; j < len(h.crcs); j += n {
						known[at] = append(known[at], sectorSum{len(part), h.crcs[j]})
					}
				}
				if h.off < int64(len(head)) {
					copy(head[h.off:], content) // the oldest section comes last
				}
				if err := advance(i); err != nil {
					return err
				}
			}
		}
		for at := block * undoBlock; at < (block+1)*undoBlock; at += sector {
			if known[at] != nil {
				if err := empty(at); err != nil {
					return err
				}
				checked = max(checked, at+sector)
			}
		}
		if err := readZero(f, buf, block*undoBlock); err != nil {
			return err
		}
		for at, may := range known {
			b := buf[at-block*undoBlock:][:sector]
			ok := func(s sectorSum) bool { return crcOf(b[:s.n]) == s.crc }
			// Behind the shortest length anything may be cut off; and what a
			// later round has put behind the end that it found is not known.
			if slices.ContainsFunc(may, ok) || at+sector > low && backend.IsZero(b) || at+sector > grown {
				continue
			}
			return changed("the bytes at %#x belong to no moment of the repair", at)
		}
	}
	if err := empty(math.MaxInt64); err != nil {
		return err
	}
	if sum := sha256.Sum256(head); !bytes.Equal(sum[:], sections[0].head[:]) {
		return changed("its first bytes belong to another image (%q was repaired)", sections[0].name)
	}
	return nil
}
