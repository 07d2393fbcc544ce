// Package fat proves clusters of FAT12, FAT16, FAT32 and exFAT filesystems
// free.
//
// Design note. A FAT is a table with one entry per cluster: 0 is a free one,
// else it names the next cluster of a file or ends it. Everything that a
// table can say against itself is checked: all copies are equal, no entry
// names a free cluster, one outside the filesystem, or one that another entry
// names already; and directories, which are all read, must agree with it. The
// kind follows from the number of clusters for Windows and from fields of the
// boot sector for Linux; where the two disagree nothing is judged. The count of
// free clusters (FSInfo) is only a hint for drivers and is not looked at.
//
// exFAT (exfat.go) has a bitmap for that purpose, and its table only knows the
// files that are in pieces.
//
// Neither has a journal. A filesystem that is marked as mounted or as having
// had errors is not judged: directories and table are written in no order. A
// mark can be missing, since not every driver sets it; so an image is best
// taken when its guest is off.
//
// Sources: Microsoft's FAT specification (fatgen103) and exFAT file system
// specification; for the mark in the boot sector the Linux driver.
package fat

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"strings"

	"github.com/imagestack/imagestack/guestfs/freespace"
)

const sectorMin = 512

// geometry is what the boot sector says.
type geometry struct {
	bits                int // of an entry: 12, 16, 32
	sector              int64
	cluster             int64 // bytes
	tables, tableStart  int64 // number, byte offset of the first
	tableBytes          int64
	heap                int64  // byte offset of cluster 2
	clusters            uint32 // numbered from 2
	media               byte
	rootCluster         uint32 // FAT32
	serial              uint32
	label               string
	state               byte
	backup, sectorCount int64
}

// Detect reports whether head begins with the boot sector of a FAT filesystem
// that names its type.
func Detect(head []byte) bool {
	return len(head) >= sectorMin && head[510] == 0x55 && head[511] == 0xaa &&
		(bytes.HasPrefix(head[54:], []byte("FAT1")) || bytes.HasPrefix(head[54:], []byte("FAT  ")) || string(head[82:87]) == "FAT32")
}

func damaged(format string, args ...any) error {
	return freespace.Refuse(freespace.Damaged, "fat: %s", fmt.Sprintf(format, args...))
}

// decode reads the fields of a boot sector and checks them.
func decode(b []byte, size int64) (*geometry, error) {
	le := binary.LittleEndian
	g := &geometry{sector: int64(le.Uint16(b[11:])), tables: int64(b[16]), media: b[21]}
	if s := g.sector; s < sectorMin || s > 4096 || s&(s-1) != 0 {
		return nil, damaged("sectors of %d bytes", s)
	}
	per := int64(b[13])
	if per == 0 || per&(per-1) != 0 || per*g.sector > 256<<10 {
		return nil, damaged("clusters of %d sectors", per)
	}
	g.cluster = per * g.sector
	if g.tables != 1 && g.tables != 2 {
		return nil, freespace.Refuse(freespace.Unsupported, "fat: %d tables", g.tables)
	}
	reserved, roots := int64(le.Uint16(b[14:])), int64(le.Uint16(b[17:]))
	total, table := int64(le.Uint16(b[19:])), int64(le.Uint16(b[22:]))
	wide := table == 0
	if wide {
		table = int64(le.Uint32(b[36:]))
	}
	if total == 0 {
		total = int64(le.Uint32(b[32:]))
	}
	g.sectorCount = total
	rootSectors := (roots*32 + g.sector - 1) / g.sector
	heap := reserved + g.tables*table + rootSectors
	if reserved == 0 || table == 0 || heap >= total || wide != (roots == 0) {
		return nil, damaged("%d sectors: %d reserved, %d tables of %d, %d root entries", total, reserved, g.tables, table, roots)
	}
	if total > size/g.sector {
		return nil, freespace.Refuse(freespace.Truncated, "fat: %d sectors of %d bytes do not fit into %d bytes", total, g.sector, size)
	}
	g.tableStart, g.tableBytes, g.heap = reserved*g.sector, table*g.sector, heap*g.sector
	clusters := (total - heap) / per
	switch {
	case clusters == 0 || clusters > 0x0ffffff5:
		return nil, damaged("%d clusters", clusters)
	case clusters < 4085:
		g.bits = 12
	case clusters < 65525:
		g.bits = 16
	default:
		g.bits = 32
	}
	g.clusters = uint32(clusters)
	if wide != (g.bits == 32) {
		return nil, freespace.Refuse(freespace.Ambiguous, "fat: FAT%d by its %d clusters, and not by its other fields", g.bits, clusters)
	}
	if (clusters+2)*int64(g.bits) > g.tableBytes*8 {
		return nil, damaged("tables of %d bytes for %d clusters", g.tableBytes, clusters)
	}
	return g, g.decodeTail(b, wide)
}

// decodeTail reads the fields whose place depends on the kind.
func (g *geometry) decodeTail(b []byte, wide bool) error {
	le := binary.LittleEndian
	tail := b[36:]
	if wide {
		if flags, version := le.Uint16(b[40:]), le.Uint16(b[42:]); flags&0x80 != 0 || version != 0 {
			return freespace.Refuse(freespace.Unsupported, "fat: version %#x, tables that are not mirrored (flags %#x)", version, flags)
		}
		g.rootCluster, g.backup = le.Uint32(b[44:]), int64(le.Uint16(b[50:]))
		if g.rootCluster < 2 || g.rootCluster-2 >= g.clusters {
			return damaged("root directory in cluster %d of %d", g.rootCluster, g.clusters)
		}
		tail = b[64:]
	}
	g.state = tail[1]
	if tail[2] == 0x29 {
		g.serial = le.Uint32(tail[3:])
		g.label = strings.ToValidUTF8(strings.TrimRight(string(tail[7:18]), " \x00"), "?")
		if name := strings.TrimRight(string(tail[18:26]), " \x00"); name != "FAT" && name != fmt.Sprintf("FAT%d", g.bits) {
			return freespace.Refuse(freespace.Ambiguous, "fat: FAT%d by its %d clusters, and it calls itself %q", g.bits, g.clusters, name)
		}
	}
	return nil
}

// Free is the freespace.Reader of FAT12, FAT16 and FAT32.
func Free(ctx context.Context, r io.ReaderAt, size int64, emit freespace.Emit) (freespace.Info, error) {
	var info freespace.Info
	b := make([]byte, sectorMin)
	if err := freespace.ReadAt(r, b, 0); err != nil {
		return info, err
	}
	if !Detect(b) {
		return info, damaged("no boot sector")
	}
	g, err := decode(b, size)
	if err != nil {
		return info, err
	}
	info.Label, info.BlockSize = g.label, g.cluster
	info.UUID = fmt.Sprintf("%04X-%04X", g.serial>>16, g.serial&0xffff)
	if g.state&3 != 0 {
		return info, freespace.Refuse(freespace.NotClean, "fat: marked as mounted, or to be tested (state %#x): run fsck.fat", g.state)
	}
	if err := g.checkBackup(r, b); err != nil {
		return info, err
	}
	t := &table{geometry: g, r: r, ctx: ctx, named: make([]uint64, (uint64(g.clusters)+63)/64),
		window: freespace.NewWindow(io.NewSectionReader(r, g.tableStart, g.tableBytes), g.tableBytes)}
	if err := t.check(); err != nil {
		return info, err
	}
	if err := t.walk(); err != nil {
		return info, err
	}
	return info, t.emit(emit)
}

// checkBackup compares the geometry in the copy of a FAT32's boot sector.
func (g *geometry) checkBackup(r io.ReaderAt, first []byte) error {
	if g.backup == 0 || g.backup == 0xffff {
		return nil
	}
	at := g.backup * g.sector
	if at+sectorMin > g.tableStart {
		return damaged("copy of the boot sector in sector %d", g.backup)
	}
	b := make([]byte, sectorMin)
	if err := freespace.ReadAt(r, b, at); err != nil {
		return err
	}
	if !bytes.Equal(b[11:52], first[11:52]) {
		return damaged("the boot sector and its copy disagree")
	}
	return nil
}
