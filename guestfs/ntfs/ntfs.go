// Package ntfs proves clusters of an NTFS filesystem free.
//
// Design note. $Bitmap has a bit for each cluster. It is believed when three
// things hold. The filesystem was unmounted: no flag of $Volume is set,
// $LogFile ends with a clean restart area or is empty, and no Windows waits in
// hiberfil.sys (as it also does after a "fast startup" shutdown). Every
// cluster of every attribute of every file record in use is marked in it, so
// the whole master file table is read. And the files together have no more
// clusters than are marked, so that none belongs to two.
//
// The second rule also catches copies of a filesystem that was mounted by a
// driver that marks nothing, as ntfs-3g does.
//
// Shadow copies need clusters that the volume calls free; with any, nothing is
// judged. Nothing is replayed.
//
// Memory is a window of the bitmap, a piece of the table and the runs of the
// system files, whatever the size of the filesystem.
//
// Sources: the documentation of the Linux-NTFS project, and for the log file
// the behaviour of ntfs-3g.
package ntfs

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/imagestack/imagestack/guestfs/freespace"
)

const (
	oemID      = "NTFS    "
	bootSize   = 512
	maxCluster = 2 << 20

	recordMFT    = 0
	recordLog    = 2
	recordVolume = 3
	recordRoot   = 5
	recordBitmap = 6
)

// Detect reports whether head begins with the boot sector of an NTFS.
func Detect(head []byte) bool {
	return len(head) >= bootSize && string(head[3:11]) == oemID
}

func damaged(format string, args ...any) error {
	return freespace.Refuse(freespace.Damaged, "ntfs: %s", fmt.Sprintf(format, args...))
}

// volume is a filesystem while it is judged.
type volume struct {
	r   io.ReaderAt
	ctx context.Context

	sector, cluster int64  // bytes
	clusters        uint64 // of the filesystem
	mftStart        uint64 // cluster
	record          int64  // bytes of a file record
	serial          uint64

	mft, bitmap *file
	marked      *freespace.Window // bits of $Bitmap
	owned       uint64            // clusters of all files so far
}

// Free is the freespace.Reader of NTFS.
func Free(ctx context.Context, r io.ReaderAt, size int64, emit freespace.Emit) (freespace.Info, error) {
	var info freespace.Info
	v := &volume{r: r, ctx: ctx}
	if err := v.readBoot(size); err != nil {
		return info, err
	}
	info.UUID, info.BlockSize = fmt.Sprintf("%016X", v.serial), v.cluster
	if err := v.readMFT(); err != nil {
		return info, err
	}
	label, err := v.checkVolume()
	info.Label = label
	if err != nil {
		return info, err
	}
	if err := v.checkLog(); err != nil {
		return info, err
	}
	if err := v.checkShadow(); err != nil {
		return info, err
	}
	if err := v.readBitmap(); err != nil {
		return info, err
	}
	if err := v.walk(); err != nil {
		return info, err
	}
	return info, v.emit(emit)
}

// readBoot reads and checks the boot sector.
func (v *volume) readBoot(size int64) error {
	b := make([]byte, bootSize)
	if err := freespace.ReadAt(v.r, b, 0); err != nil {
		return err
	}
	le := binary.LittleEndian
	if !Detect(b) || b[510] != 0x55 || b[511] != 0xaa {
		return damaged("no boot sector")
	}
	v.sector = int64(le.Uint16(b[11:]))
	if v.sector < 256 || v.sector > 4096 || v.sector&(v.sector-1) != 0 {
		return damaged("sectors of %d bytes", v.sector)
	}
	per := int64(b[13])
	if per > 0x80 { // a power of two
		if per = 256 - per; per > 12 {
			return damaged("clusters of 2^%d sectors", per)
		}
		per = 1 << per
	}
	v.cluster = per * v.sector
	if per == 0 || per&(per-1) != 0 || v.cluster > maxCluster || v.cluster < 512 {
		return damaged("clusters of %d sectors", per)
	}
	if !bytes.Equal(b[14:21], make([]byte, 7)) || le.Uint16(b[22:]) != 0 || le.Uint32(b[32:]) != 0 {
		return damaged("the boot sector has fields of a FAT")
	}
	sectors := le.Uint64(b[40:])
	if sectors == 0 || sectors > uint64(size/v.sector) {
		return freespace.Refuse(freespace.Truncated, "ntfs: %d sectors of %d bytes do not fit into %d bytes", sectors, v.sector, size)
	}
	v.clusters = sectors / uint64(per)
	v.mftStart, v.serial = le.Uint64(b[48:]), le.Uint64(b[72:])
	n := int64(int8(b[64]))
	switch {
	case n > 0:
		v.record = n * v.cluster
	case n >= -16:
		v.record = 1 << -n
	}
	if v.record < 1024 || v.record > 64<<10 || v.record&(v.record-1) != 0 {
		return damaged("file records of %d bytes (%d)", v.record, n)
	}
	if v.mftStart == 0 || v.mftStart >= v.clusters {
		return damaged("master file table in cluster %d of %d", v.mftStart, v.clusters)
	}
	return nil
}

// readMFT reads record 0, which says where all records are.
func (v *volume) readMFT() error {
	b := make([]byte, v.record)
	if err := freespace.ReadAt(v.r, b, int64(v.mftStart)*v.cluster); err != nil {
		return err
	}
	rec, err := v.decodeRecord(b, recordMFT)
	if err != nil {
		return err
	}
	if v.mft, err = v.open(rec, attrData); err != nil {
		return err
	}
	if r := v.mft.runs[0]; r.lcn != int64(v.mftStart) || v.mft.initialized > v.mft.size || v.mft.initialized < 16*v.record {
		return damaged("the master file table begins in cluster %d for the boot sector, in %d for itself", v.mftStart, r.lcn)
	}
	return nil
}

// system reads the record of a system file.
func (v *volume) system(n int64) (*record, error) {
	b := make([]byte, v.record)
	if err := freespace.ReadAt(v.mft, b, n*v.record); err != nil {
		return nil, err
	}
	return v.decodeRecord(b, n)
}

// readBitmap opens $Bitmap, which has a bit for each cluster, rounded up.
func (v *volume) readBitmap() error {
	rec, err := v.system(recordBitmap)
	if err != nil {
		return err
	}
	if v.bitmap, err = v.open(rec, attrData); err != nil {
		return err
	}
	if need := int64(v.clusters+7) / 8; v.bitmap.size < need || v.bitmap.size > need+8 || v.bitmap.initialized != v.bitmap.size {
		return damaged("$Bitmap of %d bytes for %d clusters", v.bitmap.size, v.clusters)
	}
	v.marked = freespace.NewWindow(v.bitmap, v.bitmap.size)
	return nil
}

// emit hands over the clusters that are not marked, and compares the number of
// the others with that of the files.
func (v *volume) emit(emit freespace.Emit) error {
	used, err := freespace.Zeros(v.ctx, v.bitmap, int64(v.clusters), func(start, n int64) error {
		return emit(start*v.cluster, n*v.cluster)
	})
	if err != nil {
		return err
	}
	if v.owned > uint64(used) {
		return freespace.Refuse(freespace.CountMismatch, "ntfs: the files have %d clusters, %d are marked as used: run chkdsk", v.owned, used)
	}
	return nil
}
