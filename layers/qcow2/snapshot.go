package qcow2

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"

	"github.com/imagestack/imagestack/layers"
)

// Limits of the snapshot table, those of QEMU.
const (
	maxSnapshots          = 65536
	maxSnapshotExtra      = 1024
	maxSnapshotTableBytes = 64 << 20
)

// Offsets in a snapshot table entry (section Snapshots).
const (
	snapL1Offset     = 0
	snapL1Size       = 8
	snapIDLen        = 12
	snapNameLen      = 14
	snapSec          = 16
	snapNsec         = 20
	snapVMClock      = 24
	snapVMState32    = 32
	snapExtraLen     = 36
	snapFixed        = 40
	snapExtraVMState = 0 // in the extra data
	snapExtraDisk    = 8
	snapExtraV3      = 16 // what version 3 demands of extra data
)

// snapshotEntry is one internal snapshot.
type snapshotEntry struct {
	off       int64 // of the entry in the image file
	len       int64 // of the entry without its padding
	l1Off     uint64
	l1Entries uint32
	sec, nsec uint32
	vmClock   uint64 // nanoseconds
	vmState   uint64 // bytes
	diskSize  uint64 // bytes; the active size when the entry does not say
	extra     []byte // as found, known and unknown fields
	id, name  string
}

// eachSnapshot reads the snapshot table that h names and calls do for every entry. It
// returns the length of the table in bytes. The entries are independent of
// each other and may be kept.
func (img *Image) eachSnapshot(ctx context.Context, h *Header, do func(*snapshotEntry) error) (int64, error) {
	start := int64(h.SnapshotsOffset)
	if h.NbSnapshots > 0 && start == 0 {
		return 0, img.corrupt(offSnapshotsOffset, "snapshots_offset", h.SnapshotsOffset, "the snapshot table would be the header")
	}
	off := start
	r := bufio.NewReaderSize(io.NewSectionReader(img.f, start, math.MaxInt64-start), 16<<10)
	for i := range h.NbSnapshots {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		if off -= start; off > maxSnapshotTableBytes {
			return 0, img.corrupt(start+off, "snapshot table", nil, "it is longer than 64 MiB")
		}
		off += start
		s, err := img.readSnapshot(r, off)
		if err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				err = img.corrupt(off, fmt.Sprintf("snapshot table entry %d", i), nil, "it reaches behind the end of the file")
			}
			return 0, err
		}
		off += (s.len + 7) &^ 7
		if i+1 < h.NbSnapshots {
			if _, err := r.Discard(int(-s.len & 7)); err != nil && !errors.Is(err, io.EOF) {
				return 0, img.errorf(off, "snapshot table", nil, err)
			}
		}
		if err := do(s); err != nil {
			return 0, err
		}
	}
	return off - start, nil
}

// readSnapshot reads one entry, which begins at off in the image file. An
// entry that is cut off is io.EOF or io.ErrUnexpectedEOF.
func (img *Image) readSnapshot(r io.Reader, off int64) (*snapshotEntry, error) {
	var b [snapFixed]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return nil, err
	}
	s := &snapshotEntry{
		off:       off,
		l1Off:     be64(b[snapL1Offset:]),
		l1Entries: be32(b[snapL1Size:]),
		sec:       be32(b[snapSec:]),
		nsec:      be32(b[snapNsec:]),
		vmClock:   be64(b[snapVMClock:]),
		vmState:   uint64(be32(b[snapVMState32:])),
		diskSize:  img.hdr.Size,
	}
	extra := be32(b[snapExtraLen:])
	if extra > maxSnapshotExtra {
		return nil, img.corrupt(off+snapExtraLen, "snapshot extra_data_size", extra, "too much extra data")
	}
	idLen, nameLen := int(b[snapIDLen])<<8|int(b[snapIDLen+1]), int(b[snapNameLen])<<8|int(b[snapNameLen+1])
	rest := make([]byte, int(extra)+idLen+nameLen)
	if _, err := io.ReadFull(r, rest); err != nil {
		return nil, err
	}
	s.extra = rest[:extra:extra]
	s.id, s.name = string(rest[extra:][:idLen]), string(rest[extra:][idLen:])
	s.len = snapFixed + int64(len(rest))
	if len(s.extra) >= snapExtraVMState+8 {
		s.vmState = be64(s.extra[snapExtraVMState:])
	}
	if len(s.extra) >= snapExtraDisk+8 {
		s.diskSize = be64(s.extra[snapExtraDisk:])
	}
	return s, nil
}

// check validates what the entry says about its L1 table and disk.
func (img *Image) checkSnapshot(s *snapshotEntry) error {
	need, ok := img.l1Need(s.diskSize)
	switch {
	case uint64(s.l1Entries)*8 > maxL1Bytes:
		return img.corrupt(s.off+snapL1Size, "snapshot l1_size", s.l1Entries, "the L1 table is too large")
	case !img.tableAt(s.l1Off, uint64(s.l1Entries)*8) || s.l1Entries > 0 && s.l1Off < uint64(img.clusterSize):
		return img.corrupt(s.off+snapL1Offset, "snapshot l1_table_offset", s.l1Off, "the L1 table is not on a cluster boundary of the file")
	case !ok:
		return img.corrupt(s.off+snapFixed+snapExtraDisk, "snapshot disk size", s.diskSize, "too large for the cluster size")
	case uint64(s.l1Entries) < need:
		return img.corrupt(s.off+snapL1Size, "snapshot l1_size", s.l1Entries, "the L1 table is too small for the snapshot's disk size")
	}
	return nil
}

// selectSnapshot makes Lookup answer from the snapshot with that id or, when
// no id matches, that name.
func (img *Image) selectSnapshot(ctx context.Context, which string) error {
	var byID, byName *snapshotEntry
	var known []string
	_, err := img.eachSnapshot(ctx, &img.hdr, func(s *snapshotEntry) error {
		if s.id == which && byID == nil {
			byID = s
		}
		if s.name == which && byName == nil {
			byName = s
		}
		if len(known) < 20 {
			known = append(known, fmt.Sprintf("%s (%s)", s.id, s.name))
		}
		return nil
	})
	if err != nil {
		return err
	}
	s := byID
	if s == nil {
		s = byName
	}
	if s == nil {
		there := "it has no snapshots"
		if len(known) > 0 {
			there = "it has " + strings.Join(known, ", ")
			if int(img.hdr.NbSnapshots) > len(known) {
				there += ", …"
			}
		}
		return img.errorf(-1, "snapshot", which, fmt.Errorf("%w: no such snapshot; %s", layers.ErrFormat, there))
	}
	if img.hdr.Version >= 3 && len(s.extra) < snapExtraV3 {
		return img.corrupt(s.off+snapExtraLen, "snapshot extra_data_size", uint32(len(s.extra)), "version 3 needs at least 16 bytes")
	}
	if err := img.checkSnapshot(s); err != nil {
		return err
	}
	img.size, img.snapshot = int64(s.diskSize), s.id
	img.l1Off, img.l1Entries = int64(s.l1Off), int64(s.l1Entries)
	return nil
}
