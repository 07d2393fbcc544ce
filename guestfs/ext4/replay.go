package ext4

import (
	"context"
	"encoding/binary"
	"io"
	"slices"
	"sort"

	"github.com/imagestack/imagestack/guestfs/freespace"
)

// maxEntries bounds the blocks that an overlay replaces, and the revoked ones:
// about 40 bytes each. The journal of mke2fs has at most 262,144 blocks.
const maxEntries = 1 << 20

// overlay reads a filesystem as a replay of its journal would leave it.
type overlay struct {
	r         io.ReaderAt
	blockSize int64
	blocks    map[uint64]copied
}

// copied is where the journal has the content of a block.
type copied struct {
	at      uint64 // block on the disk
	escaped bool   // its first four bytes, the journal's magic, are zeros there
}

// ReadAt implements io.ReaderAt.
func (o *overlay) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return o.r.ReadAt(p, off)
	}
	done := 0
	for done < len(p) {
		at := off + int64(done)
		in := at % o.blockSize
		q := p[done:]
		q = q[:min(int64(len(q)), o.blockSize-in)]
		c, ok := o.blocks[uint64(at/o.blockSize)]
		if ok {
			at = int64(c.at)*o.blockSize + in
		}
		n, err := o.r.ReadAt(q, at)
		if ok && c.escaped {
			var magic [4]byte
			binary.BigEndian.PutUint32(magic[:], jbdMagic)
			for i := in; i < min(int64(len(magic)), in+int64(n)); i++ {
				q[i-in] = magic[i]
			}
		}
		done += n
		if n < len(q) {
			if err == nil {
				err = io.ErrUnexpectedEOF
			}
			return done, err
		}
	}
	return done, nil
}

// replay reads the journal of s. Its blocks and those of its map are added to
// fixed. When it must be replayed it returns the overlay and the superblock as
// seen through it, else s and nil.
func replay(ctx context.Context, r io.ReaderAt, s *super, size int64, fixed *spans) (*super, *overlay, error) {
	files, err := journalMap(ctx, r, s)
	if err != nil {
		return nil, nil, err
	}
	for _, e := range files.runs {
		if err := fixed.add(e.start, e.n); err != nil {
			return nil, nil, err
		}
	}
	for _, b := range files.own {
		if err := fixed.add(b, 1); err != nil {
			return nil, nil, err
		}
	}
	j := &journal{s: s, files: files}
	b := make([]byte, s.blockSize)
	if err := j.read(r, b, 0); err != nil {
		return nil, nil, err
	}
	if err := j.validate(b); err != nil {
		return nil, nil, err
	}
	if !s.inc(incompatRecover) {
		if j.start != 0 {
			return nil, nil, damaged("the journal holds transactions and needs_recovery is not set: run e2fsck")
		}
		return s, nil, nil
	}
	if s.com(compatFastCommit) || j.inc(jbdFastCommit) {
		return nil, nil, freespace.Refuse(freespace.NotClean, "ext: the journal may hold fast commits: mount and unmount it, or run e2fsck")
	}
	if j.start == 0 {
		return s, nil, nil
	}
	p := &player{j: j, r: r, ctx: ctx, revokes: map[uint64]uint32{}, buf: b, data: make([]byte, s.blockSize),
		over: &overlay{r: r, blockSize: s.blockSize, blocks: map[uint64]copied{}}}
	own := spans{list: slices.Clone(fixed.list)}
	if p.own, err = own.sorted(); err != nil {
		return nil, nil, err
	}
	for _, pass := range []func() error{p.scan, p.collect, p.apply} {
		if err := pass(); err != nil {
			return nil, nil, err
		}
	}
	after, err := readSuper(p.over, superOffset)
	if err != nil {
		return nil, nil, err
	}
	if err := after.check(size); err != nil {
		return nil, nil, err
	}
	if err := s.sameLayout(after); err != nil {
		return nil, nil, err
	}
	if after.journalInode != s.journalInode || after.mmpBlock != s.mmpBlock || (after.compat^s.compat)&compatHasJournal != 0 ||
		(after.incompat^s.incompat)&(incompatMMP|incompatRecover) != 0 {
		return nil, nil, damaged("the superblock in the journal has other features")
	}
	return after, p.over, nil
}

// read fills p from a block of the journal.
func (j *journal) read(r io.ReaderAt, p []byte, n uint64) error {
	return j.s.readBlock(r, p, j.files.block(n))
}

// player goes through the log three times, as a recovery does: to find its
// end, to find the revoked blocks, and to take what remains. Whatever an
// honest crash does not leave behind is refused rather than skipped.
type player struct {
	j         *journal
	r         io.ReaderAt
	ctx       context.Context
	end       uint32            // the first sequence number that was not committed
	revokes   map[uint64]uint32 // block: highest sequence number that revoked it
	own       []span            // of the journal and its map, sorted
	over      *overlay
	buf, data []byte
}

// visitor gets the blocks of a log in order. descriptor gets also the
// journal's block behind the descriptor.
type visitor struct {
	descriptor func(tags []tag, at uint64, sequence uint32) error
	revoke     func(sequence uint32) error
	commit     func() error
}

// walk follows the log from its start and returns the sequence number at
// which it ends: the first block that has no header with the expected number,
// or stop.
func (p *player) walk(v visitor, stop *uint32) (uint32, error) {
	j := p.j
	be := binary.BigEndian
	room := j.blocks - j.first
	sequence, at := j.sequence, j.start
	for walked := uint64(0); stop == nil || sequence != *stop; {
		if err := p.ctx.Err(); err != nil {
			return 0, err
		}
		if walked >= room {
			return 0, damaged("journal: the log runs into itself")
		}
		if err := j.read(p.r, p.buf, at); err != nil {
			return 0, err
		}
		if be.Uint32(p.buf) != jbdMagic || be.Uint32(p.buf[8:]) != sequence {
			if stop != nil {
				return 0, damaged("journal: it changed while it was read")
			}
			break
		}
		at, walked = j.step(at, 1), walked+1
		switch kind := be.Uint32(p.buf[4:]); kind {
		case jbdDescriptor:
			tags, err := j.tags(p.buf)
			if err != nil {
				return 0, err
			}
			if uint64(len(tags)) > room-walked {
				return 0, damaged("journal: the log runs into itself")
			}
			if v.descriptor != nil {
				if err := v.descriptor(tags, at, sequence); err != nil {
					return 0, err
				}
			}
			at, walked = j.step(at, uint64(len(tags))), walked+uint64(len(tags))
		case jbdRevoke:
			// The feature may still be missing: it is set in memory with the first
			// revoke, and reaches the journal's superblock later.
			if v.revoke != nil {
				if err := v.revoke(sequence); err != nil {
					return 0, err
				}
			}
		case jbdCommit:
			if v.commit != nil {
				if err := v.commit(); err != nil {
					return 0, err
				}
			}
			sequence++
		default:
			return 0, damaged("journal: a block of type %d", kind)
		}
	}
	return sequence, nil
}

// scan finds the end of the log and compares the checksums of its commits.
func (p *player) scan() error {
	sum := ^uint32(0)
	v1 := p.j.compat&jbdCompatChecksum != 0
	v := visitor{
		commit: func() error {
			got := sum
			sum = ^uint32(0)
			return p.j.checkCommit(p.buf, got)
		},
	}
	if v1 {
		v.descriptor = func(tags []tag, at uint64, _ uint32) error {
			sum = crc32be(sum, p.buf)
			for i := range tags {
				if err := p.j.read(p.r, p.data, p.j.step(at, uint64(i))); err != nil {
					return err
				}
				sum = crc32be(sum, p.data)
			}
			return nil
		}
	}
	end, err := p.walk(v, nil)
	p.end = end
	return err
}

// collect finds the revoked blocks.
func (p *player) collect() error {
	_, err := p.walk(visitor{revoke: func(sequence uint32) error {
		return p.j.revoked(p.buf, func(block uint64) error {
			if old, ok := p.revokes[block]; !ok || int32(sequence-old) > 0 {
				p.revokes[block] = sequence
			}
			if len(p.revokes) > maxEntries {
				return freespace.Refuse(freespace.TooLarge, "ext: more than %d revoked blocks in the journal", maxEntries)
			}
			return nil
		})
	}}, &p.end)
	return err
}

// apply puts every block that was not revoked afterwards into the overlay.
func (p *player) apply() error {
	_, err := p.walk(visitor{descriptor: func(tags []tag, at uint64, sequence uint32) error {
		for i, t := range tags {
			if by, ok := p.revokes[t.target]; ok && int32(sequence-by) <= 0 {
				continue
			}
			from := p.j.step(at, uint64(i))
			if err := p.j.read(p.r, p.data, from); err != nil {
				return err
			}
			if err := p.j.checkData(t, p.data, sequence); err != nil {
				return err
			}
			if t.target >= p.j.s.blocks || p.inJournal(t.target) {
				return damaged("journal: it wants to write to block %d", t.target)
			}
			p.over.blocks[t.target] = copied{p.j.files.block(from), t.flags&tagEscape != 0}
			if len(p.over.blocks) > maxEntries {
				return freespace.Refuse(freespace.TooLarge, "ext: more than %d blocks in the journal", maxEntries)
			}
		}
		return nil
	}}, &p.end)
	return err
}

// inJournal reports whether a block is the journal's own.
func (p *player) inJournal(block uint64) bool {
	i := sort.Search(len(p.own), func(i int) bool { return p.own[i].end() > block })
	return i < len(p.own) && p.own[i].start <= block
}
