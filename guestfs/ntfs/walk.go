package ntfs

import (
	"bytes"
	"encoding/binary"
	"strings"
	"unicode/utf16"

	"github.com/imagestack/imagestack/guestfs/freespace"
)

// checkVolume looks at the version and the flags of the filesystem and returns
// its name.
func (v *volume) checkVolume() (string, error) {
	rec, err := v.system(recordVolume)
	if err != nil {
		return "", err
	}
	label := ""
	if a, err := rec.find(attrVolumeName); err != nil {
		return "", err
	} else if a != nil {
		label = decodeName(a.value)
	}
	a, err := rec.find(attrVolumeInfo)
	if err != nil {
		return label, err
	}
	if a == nil || len(a.value) < 12 {
		return label, damaged("$Volume without its information")
	}
	switch major, minor := a.value[8], a.value[9]; {
	case major == 1 && minor == 2, major == 3 && minor <= 1:
	default:
		return label, freespace.Refuse(freespace.UnknownFeature, "ntfs: version %d.%d", major, minor)
	}
	const mountedOnNT4 = 0x8
	if f := binary.LittleEndian.Uint16(a.value[10:]); f&^mountedOnNT4 != 0 {
		return label, freespace.Refuse(freespace.NotClean, "ntfs: the volume is marked as dirty or being changed (flags %#x): start its Windows, or run chkdsk", f)
	}
	return label, nil
}

func decodeName(b []byte) string {
	var u []uint16
	for ; len(b) >= 2; b = b[2:] {
		u = append(u, binary.LittleEndian.Uint16(b))
	}
	return strings.ToValidUTF8(string(utf16.Decode(u)), "?")
}

// checkLog wants $LogFile to be empty, or the newer of its two restart pages
// to say that the filesystem was unmounted.
func (v *volume) checkLog() error {
	rec, err := v.system(recordLog)
	if err != nil {
		return err
	}
	f, err := v.open(rec, attrData)
	if err != nil {
		return err
	}
	const most = 64 << 10
	head := make([]byte, min(2*most, f.size))
	if err := freespace.ReadAt(f, head, 0); err != nil {
		return err
	}
	if len(head) < 4096 {
		return damaged("$LogFile of %d bytes", f.size)
	}
	if blank(head, 0xff) {
		return nil
	}
	dirty := freespace.Refuse(freespace.NotClean, "ntfs: $LogFile does not say that the volume was unmounted: start its Windows and shut it down in full, or run chkdsk")
	le := binary.LittleEndian
	page := int(le.Uint32(head[16:]))
	if page < 4096 || page > most || page&(page-1) != 0 || 2*page > len(head) {
		return dirty
	}
	newest, clean := uint64(0), false
	for i := range 2 {
		b := head[i*page:][:page]
		if string(b[:4]) != "RSTR" || int(le.Uint32(b[16:])) != page || fixup(b, "restart page", int64(i)) != nil {
			return dirty
		}
		at := int(le.Uint16(b[24:]))
		if at < 30 || at+48 > fixupSector {
			return dirty
		}
		area := b[at:]
		const noClient, volumeClean = 0xffff, 2
		if lsn := le.Uint64(area); lsn >= newest {
			newest = lsn
			clean = le.Uint16(area[12:]) == noClient || le.Uint16(area[14:])&volumeClean != 0
		}
	}
	if !clean {
		return dirty
	}
	return nil
}

func blank(b []byte, with byte) bool { return bytes.Count(b, []byte{with}) == len(b) }

// walk reads the whole master file table.
func (v *volume) walk() error {
	rec, err := v.system(recordMFT)
	if err != nil {
		return err
	}
	used, err := v.open(rec, attrBitmap)
	if err != nil {
		return err
	}
	records := v.mft.initialized / v.record
	const piece = 64 << 10 // holds a file record of any size
	b, bits := make([]byte, piece), make([]byte, piece/1024/8)
	per := int64(len(b)) / v.record
	for first := int64(0); first < records; first += per {
		if err := v.ctx.Err(); err != nil {
			return err
		}
		n := min(per, records-first)
		if err := freespace.ReadAt(v.mft, b[:n*v.record], first*v.record); err != nil {
			return err
		}
		low := first / 8
		if have := min(int64(len(bits)), used.size-low); have > 0 {
			if err := freespace.ReadAt(used, bits[:have], low); err != nil {
				return err
			}
			clear(bits[have:])
		} else {
			clear(bits)
		}
		for i := range n {
			k := first + i - low*8
			marked := bits[k/8]>>(k%8)&1 != 0
			if err := v.judgeRecord(b[i*v.record:][:v.record], first+i, marked); err != nil {
				return err
			}
		}
	}
	return nil
}

// judgeRecord checks that every cluster of a file is marked as used.
func (v *volume) judgeRecord(b []byte, number int64, marked bool) error {
	if !marked && string(b[:4]) != "FILE" {
		return nil // never used
	}
	rec, err := v.decodeRecord(b, number)
	if err != nil {
		return err
	}
	if rec.inUse != marked {
		// mkntfs and Windows keep the records up to 15 marked and not in use;
		// those up to 23 are kept for later as well.
		if number < 24 && !rec.inUse {
			return nil
		}
		return damaged("file record %d is in use: %v; in the bitmap of the records: %v", number, rec.inUse, marked)
	}
	for i := range rec.attrs {
		a := &rec.attrs[i]
		for _, r := range a.runs {
			if r.lcn < 0 {
				continue
			}
			ok, err := v.marked.Ones(r.lcn, r.n)
			if err != nil {
				return err
			}
			if !ok {
				return damaged("file record %d has clusters %d+%d, of which some are marked as free: run chkdsk", number, r.lcn, r.n)
			}
			v.owned += uint64(r.n)
		}
		if a.kind != attrFileName {
			continue
		}
		name, parent := fileName(a.value)
		if strings.Contains(strings.ToLower(name), shadowName) {
			return errShadow
		}
		// Into this file of the root directory Windows saves its memory.
		if parent == recordRoot && strings.EqualFold(name, "hiberfil.sys") {
			if err := v.checkHiberfil(rec); err != nil {
				return err
			}
		}
	}
	return nil
}

// Shadow copies (restore points, Volume Shadow Copy) have what the volume held
// at some moment: of that, only what was overwritten since is in files of their
// own; the rest is still where it was, also when the volume itself calls it
// free by now. A header at a fixed place leads to their catalogue, and their
// files have the same GUID in their names (libvshadow: volume header).
const (
	shadowAt      = 0x1e00
	shadowID      = "\x6b\x87\x08\x38\x76\xc1\x48\x4e\xb7\xae\x04\x04\x6e\x6c\xc7\x52"
	shadowCatalog = 48
	shadowName    = "{3808876b-c176-4e48-b7ae-04046e6cc752}"
)

var errShadow = freespace.Refuse(freespace.Unsupported, "ntfs: the volume has shadow copies (restore points), which need more than its files: delete them, or let its Windows trim")

// checkShadow refuses a volume with a catalogue of shadow copies.
func (v *volume) checkShadow() error {
	b := make([]byte, shadowCatalog+8)
	if err := freespace.ReadAt(v.r, b, shadowAt); err != nil {
		return err
	}
	if string(b[:len(shadowID)]) == shadowID && binary.LittleEndian.Uint64(b[shadowCatalog:]) != 0 {
		return errShadow
	}
	return nil
}

// fileName is the name in an attribute of that kind, and the record of the
// directory that it is in.
func fileName(b []byte) (name string, parent int64) {
	const nameAt = 66
	if len(b) < nameAt {
		return "", -1
	}
	n := int(b[64]) * 2
	if n > len(b)-nameAt {
		return "", -1
	}
	return decodeName(b[nameAt:][:n]), reference(b)
}

// checkHiberfil refuses unless the file is certainly not one to resume from:
// it is empty, it begins with zeros, or it says that it was resumed from.
func (v *volume) checkHiberfil(rec *record) error {
	hibernated := freespace.Refuse(freespace.InUse, "ntfs: Windows is hibernated in hiberfil.sys (or was shut down by a fast startup): shut it down in full")
	a, err := rec.find(attrData)
	if err != nil || a == nil {
		return hibernated
	}
	head := make([]byte, min(4096, max(a.size, int64(len(a.value)))))
	switch {
	case a.resident:
		copy(head, a.value)
	case a.ready == 0 || len(head) == 0 || len(a.runs) == 0:
		return nil
	default:
		if a.runs[0].lcn < 0 {
			return hibernated
		}
		if err := freespace.ReadAt(v.r, head[:min(int64(len(head)), v.cluster)], a.runs[0].lcn*v.cluster); err != nil {
			return err
		}
	}
	if blank(head, 0) || len(head) >= 4 && strings.EqualFold(string(head[:4]), "wake") {
		return nil
	}
	return hibernated
}
