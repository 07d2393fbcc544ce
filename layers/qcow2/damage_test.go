package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
)

// victim is a golden image to be damaged, with the places of its tables.
type victim struct {
	b      []byte
	h      *Header
	l1, l2 int64 // tables of the active state
}

func newVictim(t testing.TB, name string) *victim {
	t.Helper()
	v := &victim{b: golden(t, name+".qcow2")}
	var err error
	if v.h, err = parseHeader(v.b); err != nil {
		t.Fatal(err)
	}
	v.l1 = int64(v.h.L1Offset)
	v.l2 = int64(v.get64(v.l1) & entryOffset)
	return v
}

func (v *victim) get64(off int64) uint64    { return be64(v.b[off:]) }
func (v *victim) set64(off int64, x uint64) { binary.BigEndian.PutUint64(v.b[off:], x) }
func (v *victim) set32(off int64, x uint32) { binary.BigEndian.PutUint32(v.b[off:], x) }

// or sets bits of a word.
func (v *victim) or(off int64, x uint64) { v.set64(off, v.get64(off)|x) }

// at is the offset of the L2 entry of a guest cluster below the first table.
func (v *victim) at(cluster int64) int64 {
	if v.h.ExtendedL2() {
		return v.l2 + cluster*16
	}
	return v.l2 + cluster*8
}

// ext is the offset of an extension's data.
func (v *victim) ext(typ uint32) int64 { return v.h.extension(typ).Off }

// everything opens an image and asks for all that the read side can tell.
func everything(t testing.TB, b []byte, o layers.OpenOptions) error {
	img, err := openBytes(t, b, o)
	if err != nil {
		return err
	}
	defer img.Close()
	if _, err := readAll(img, nil); err != nil {
		return err
	}
	ctx := context.Background()
	if _, err := img.Describe(ctx); err != nil {
		return err
	}
	return img.WalkHost(ctx, func(layers.HostRange) error { return nil })
}

// TestDamage pokes into images and expects the error that names the place.
func TestDamage(t *testing.T) {
	const past = 1 << 40 // an aligned offset behind the end
	snap := func(v *victim) int64 { return int64(v.h.SnapshotsOffset) }
	dir := func(v *victim) int64 { return int64(be64(v.b[v.ext(extBitmaps)+bitmapsDirOffset:])) }
	format, corrupt, unsupported := layers.ErrFormat, layers.ErrCorrupt, layers.ErrUnsupported
	for _, c := range []struct {
		name  string
		image string
		poke  func(*victim)
		class error // nil: everything works
		field string
	}{
		{"untouched", "v3", func(v *victim) {}, nil, ""},
		// The header.
		{"magic", "v3", func(v *victim) { v.b[3] = 0 }, format, "magic"},
		{"version 1", "v3", func(v *victim) { v.set32(offVersion, 1) }, unsupported, "version"},
		{"version 4", "v3", func(v *victim) { v.set32(offVersion, 4) }, unsupported, "version"},
		{"cut in the header", "v3", func(v *victim) { v.b = v.b[:100] }, format, "header"},
		{"cluster_bits 8", "v3", func(v *victim) { v.set32(offClusterBits, 8) }, format, "cluster_bits"},
		{"cluster_bits 22", "v3", func(v *victim) { v.set32(offClusterBits, 22) }, format, "cluster_bits"},
		{"cluster_bits max", "v3", func(v *victim) { v.set32(offClusterBits, 1<<32-1) }, format, "cluster_bits"},
		{"size 2^63", "v3", func(v *victim) { v.set64(offSize, 1<<63) }, format, "size"},
		{"size 2^62", "v3", func(v *victim) { v.set64(offSize, 1<<62) }, format, "size"},
		{"size over L1", "v3", func(v *victim) { v.set64(offSize, 3000320*4) }, format, "l1_size"},
		{"AES", "v3", func(v *victim) { v.set32(offCryptMethod, 1) }, unsupported, "crypt_method"},
		{"LUKS", "v3", func(v *victim) { v.set32(offCryptMethod, 2) }, unsupported, "crypt_method"},
		{"crypt_method 3", "v3", func(v *victim) { v.set32(offCryptMethod, 3) }, unsupported, "crypt_method"},
		{"l1_size 0", "v3", func(v *victim) { v.set32(offL1Size, 0) }, format, "l1_size"},
		{"l1_size huge", "v3", func(v *victim) { v.set32(offL1Size, 1<<32-1) }, format, "l1_size"},
		{"l1 unaligned", "v3", func(v *victim) { v.set64(offL1Offset, v.h.L1Offset+512) }, format, "l1_table_offset"},
		{"l1 at 2^62", "v3", func(v *victim) { v.set64(offL1Offset, 1<<62) }, corrupt, "L1 table"},
		{"l1 at 2^63", "v3", func(v *victim) { v.set64(offL1Offset, 1<<63) }, format, "l1_table_offset"},
		{"reftable unaligned", "v3", func(v *victim) { v.set64(offRefcountTableOffset, 4097) }, format, "refcount_table_offset"},
		{"reftable clusters", "v3", func(v *victim) { v.set32(offRefcountTableClusters, 1<<32-1) }, format, "refcount_table_clusters"},
		{"nb_snapshots", "v3", func(v *victim) { v.set32(offNbSnapshots, 1<<32-1) }, format, "nb_snapshots"},
		{"snapshots_offset", "v3", func(v *victim) { v.set64(offSnapshotsOffset, 0x1234) }, format, "snapshots_offset"},
		{"unknown incompatible bit", "v3", func(v *victim) { v.or(offIncompatible, 1<<40) }, unsupported, "incompatible_features"},
		{"unknown compatible bit", "v3", func(v *victim) { v.or(offCompatible, 1<<40) }, nil, ""},
		{"unknown autoclear bit", "v3", func(v *victim) { v.or(offAutoclear, 1<<40) }, nil, ""},
		{"dirty", "v3", func(v *victim) { v.or(offIncompatible, incompatDirty) }, nil, ""},
		{"corrupt", "v3", func(v *victim) { v.or(offIncompatible, incompatCorrupt) }, nil, ""},
		{"compression bit alone", "v3", func(v *victim) { v.or(offIncompatible, incompatCompression) }, format, "compression_type"},
		{"compression byte alone", "v3", func(v *victim) { v.b[offCompressionType] = 1 }, format, "compression_type"},
		{"compression 2", "zstd", func(v *victim) { v.b[offCompressionType] = 2 }, unsupported, "compression_type"},
		{"refcount_order", "v3", func(v *victim) { v.set32(offRefcountOrder, 7) }, format, "refcount_order"},
		{"header_length 100", "v3", func(v *victim) { v.set32(offHeaderLength, 100) }, format, "header_length"},
		{"header_length 109", "v3", func(v *victim) { v.set32(offHeaderLength, 109) }, format, "header_length"},
		{"header_length huge", "v3", func(v *victim) { v.set32(offHeaderLength, 1<<31) }, format, "header_length"},
		{"extension length", "v3", func(v *victim) { v.set32(int64(v.h.HeaderLength)+4, 1<<32-1) }, format, "header extension length"},
		{"extension twice", "v3", func(v *victim) {
			at := v.ext(extBitmaps) + 24
			copy(v.b[at:], v.b[at-32:at])
		}, format, "header extension type"},
		{"encryption extension", "v3", func(v *victim) { v.set32(v.ext(extBitmaps)-8, extCrypto) }, unsupported, "full disk encryption header"},
		{"backing name long", "v3", func(v *victim) { v.set64(offBackingOffset, 1024); v.set32(offBackingSize, 1024) }, format, "backing_file_size"},
		{"backing name outside", "v3", func(v *victim) { v.set64(offBackingOffset, 4090); v.set32(offBackingSize, 10) }, format, "backing_file_offset"},
		{"backing name far", "v3", func(v *victim) { v.set64(offBackingOffset, 1<<63); v.set32(offBackingSize, 10) }, format, "backing_file_offset"},
		{"backing name in header", "v3", func(v *victim) { v.set64(offBackingOffset, 8); v.set32(offBackingSize, 10) }, format, "backing_file_offset"},
		{"extended L2 of 4K", "v3", func(v *victim) { v.or(offIncompatible, incompatExtendedL2) }, format, "cluster_bits"},
		{"data file unnamed", "v3", func(v *victim) { v.or(offIncompatible, incompatDataFile) }, unsupported, "external data file name"},
		{"L1 larger than needed", "v3", func(v *victim) { v.set64(offSize, 5000); v.set32(offNbSnapshots, 0) }, nil, ""},
		// L1.
		{"L1 unaligned", "v3", func(v *victim) { v.set64(v.l1, v.get64(v.l1)+0xa00) }, corrupt, "L1 entry"},
		{"L1 low bit", "v3", func(v *victim) { v.or(v.l1, 1) }, corrupt, "L1 entry"},
		{"L1 high bit", "v3", func(v *victim) { v.or(v.l1, 1<<56) }, corrupt, "L1 entry"},
		{"L1 past the end", "v3", func(v *victim) { v.set64(v.l1, past) }, corrupt, "L1 entry"},
		{"L1 to 32 PiB", "v3", func(v *victim) { v.set64(v.l1, 1<<55) }, corrupt, "L1 entry"},
		{"L1 to itself", "v3", func(v *victim) { v.set64(v.l1, uint64(v.l1)) }, corrupt, "L1 entry"},
		{"L1 COPIED alone", "v3", func(v *victim) { v.set64(v.l1+8, entryCopied) }, nil, ""},
		// L2.
		{"L2 unaligned", "v3", func(v *victim) { v.set64(v.at(0), v.get64(v.at(0))+0xa00) }, corrupt, "L2 entry"},
		{"L2 bit 1", "v3", func(v *victim) { v.or(v.at(0), 2) }, corrupt, "L2 entry"},
		{"L2 bit 56", "v3", func(v *victim) { v.or(v.at(0), 1<<56) }, corrupt, "L2 entry"},
		{"L2 past the end", "v3", func(v *victim) { v.set64(v.at(0), past) }, corrupt, "L2 entry"},
		{"L2 to 32 PiB", "v3", func(v *victim) { v.set64(v.at(0), 1<<55|entryCopied) }, corrupt, "L2 entry"},
		{"L2 into L1", "v3", func(v *victim) { v.set64(v.at(0), uint64(v.l1)) }, corrupt, "L2 entry"},
		{"L2 COPIED alone", "v3", func(v *victim) { v.set64(v.at(5), entryCopied) }, corrupt, "L2 entry"},
		{"zero with a bad place", "v3", func(v *victim) { v.or(v.at(4), 0xa00) }, corrupt, "L2 entry"},
		{"zero with a place past the end", "v3", func(v *victim) { v.set64(v.at(4), past|entryZero) }, corrupt, "L2 entry"},
		{"zero in version 2", "v2", func(v *victim) { v.or(v.at(0), entryZero) }, corrupt, "L2 entry"},
		// Compressed clusters.
		{"packed COPIED", "v3", func(v *victim) { v.or(v.at(3), entryCopied) }, corrupt, "L2 entry"},
		{"packed past the end", "v3", func(v *victim) { v.set64(v.at(3), entryCompressed|past) }, corrupt, "L2 entry"},
		{"packed at 0", "v3", func(v *victim) { v.set64(v.at(3), entryCompressed) }, corrupt, "L2 entry"},
		{"packed reserved", "v3", func(v *victim) { v.or(v.at(3), 1<<57) }, corrupt, "L2 entry"},
		{"packed sectors maxed", "v3", func(v *victim) { v.or(v.at(3), 15<<58) }, nil, ""},
		{"packed garbage", "v3", func(v *victim) {
			off := decodePacked(v.get64(v.at(3)), 12).off
			copy(v.b[off:off+8], "\xff\xff\xff\xff\xff\xff\xff\xff")
		}, corrupt, "compressed cluster"},
		{"packed zeros", "v3", func(v *victim) { clear(v.b[decodePacked(v.get64(v.at(3)), 12).off:][:16]) }, corrupt, "compressed cluster"},
		{"packed short", "v3", func(v *victim) {
			off := decodePacked(v.get64(v.at(3)), 12).off
			copy(v.b[off:], "\x01\x03\x00\xfc\xffabc") // a stored final block of 3 bytes
		}, corrupt, "compressed cluster"},
		{"zstd garbage", "zstd", func(v *victim) { v.b[decodePacked(v.get64(v.at(3)), 12).off+6] ^= 0xff }, corrupt, "compressed cluster"},
		{"zstd magic", "zstd", func(v *victim) { v.b[decodePacked(v.get64(v.at(3)), 12).off] ^= 0xff }, corrupt, "compressed cluster"},
		{"packed in a data file image", "data", func(v *victim) { v.set64(v.at(3), entryCompressed|0x5000) }, corrupt, "L2 entry"},
		{"data file offset mismatch", "data", func(v *victim) { v.set64(v.at(1), 0x2000|entryCopied) }, corrupt, "L2 entry"},
		{"data file too short", "data", func(v *victim) {
			// The last cluster of the disk is 732; 733 lies behind it and is not asked for.
			at := int64(v.get64(v.l1+8)&entryOffset) + (732-512)*8
			v.set64(at, v.get64(at)) // present in the image
			v.set64(offSize, 3000320+1<<20)
			v.set64(at+8*20, 752<<12|entryCopied)
		}, corrupt, "L2 entry"},
		// Extended L2.
		{"extended bit 0", "extl2", func(v *victim) { v.or(v.at(0), 1) }, corrupt, "L2 entry"},
		{"alloc and zero", "extl2", func(v *victim) { v.or(v.at(0)+8, 1<<40|1<<8) }, corrupt, "subcluster bitmap"},
		{"alloc without a cluster", "extl2", func(v *victim) { v.set64(v.at(20)+8, 1) }, corrupt, "subcluster bitmap"},
		{"zero without a cluster", "extl2", func(v *victim) { v.set64(v.at(20)+8, 1<<32) }, nil, ""},
		{"bitmap of a packed cluster", "extl2", func(v *victim) { v.set64(v.at(4)+8, 1<<40|1<<8) }, nil, ""},
		// The end of the file.
		{"tail cut", "v3", func(v *victim) { v.b = v.b[:v.l2] }, corrupt, "L1 entry"},
		{"file behind L1 cut", "v2", func(v *victim) { v.b = v.b[:v.l1] }, corrupt, "L1 table"},
		// Refcounts.
		{"reftable entry unaligned", "v3", func(v *victim) { v.or(int64(v.h.RefcountTableOffset), 0x200) }, corrupt, "refcount table entry"},
		{"reftable entry low bits", "v3", func(v *victim) { v.or(int64(v.h.RefcountTableOffset), 1) }, corrupt, "refcount table entry"},
		{"reftable entry past the end", "v3", func(v *victim) { v.set64(int64(v.h.RefcountTableOffset)+8, past) }, corrupt, "refcount table entry"},
		{"reftable entry 2^64", "v3", func(v *victim) { v.set64(int64(v.h.RefcountTableOffset)+8, ^uint64(0)&^0xfff) }, corrupt, "refcount table entry"},
		// Snapshots.
		{"snapshot L1 unaligned", "v3", func(v *victim) { v.set64(snap(v), 0x4100) }, corrupt, "snapshot l1_table_offset"},
		{"snapshot L1 huge", "v3", func(v *victim) { v.set32(snap(v)+snapL1Size, 1<<32-1) }, corrupt, "snapshot l1_size"},
		{"snapshot L1 short", "v3", func(v *victim) { v.set32(snap(v)+snapL1Size, 1) }, corrupt, "snapshot l1_size"},
		{"snapshot extra huge", "v3", func(v *victim) { v.set32(snap(v)+snapExtraLen, 64<<10) }, corrupt, "snapshot extra_data_size"},
		{"snapshot name long", "v3", func(v *victim) { v.b[snap(v)+snapNameLen] = 0xff }, corrupt, "snapshot table entry 0"},
		{"one snapshot too many", "v3", func(v *victim) { v.set32(offNbSnapshots, 2) }, corrupt, "snapshot l1_size"},
		{"snapshot disk size", "v3", func(v *victim) { v.set64(snap(v)+snapFixed+8, 1<<63) }, corrupt, "snapshot disk size"},
		{"snapshot L2 past the end", "v3", func(v *victim) { v.set64(int64(v.get64(snap(v))), past) }, corrupt, "L1 entry"},
		// Bitmaps.
		{"nb_bitmaps 0", "v3", func(v *victim) { v.set32(v.ext(extBitmaps), 0) }, corrupt, "nb_bitmaps"},
		{"nb_bitmaps huge", "v3", func(v *victim) { v.set32(v.ext(extBitmaps), 65536) }, corrupt, "nb_bitmaps"},
		{"one bitmap too many", "v3", func(v *victim) { v.set32(v.ext(extBitmaps), 2) }, corrupt, "bitmap_directory_size"},
		{"bitmap directory unaligned", "v3", func(v *victim) { v.set64(v.ext(extBitmaps)+16, 0x1100) }, corrupt, "bitmap_directory_offset"},
		{"bitmap name 0", "v3", func(v *victim) { v.b[dir(v)+bmNameLen+1] = 0 }, corrupt, "bitmap name_size"},
		{"bitmap flags", "v3", func(v *victim) { v.b[dir(v)+bmFlags] = 1 }, corrupt, "bitmap flags"},
		{"bitmap extra data", "v3", func(v *victim) { v.set32(dir(v)+bmExtraLen, 1<<31) }, corrupt, "bitmap extra_data_size"},
		{"bitmap table huge", "v3", func(v *victim) { v.set32(dir(v)+bmTableSize, 1<<31) }, corrupt, "bitmap_table_size"},
		{"bitmap table reserved", "v3", func(v *victim) { v.or(int64(v.get64(dir(v))), 2) }, corrupt, "bitmap table entry"},
		{"bitmap table past the end", "v3", func(v *victim) { v.set64(int64(v.get64(dir(v))), past) }, corrupt, "bitmap table entry"},
		{"bitmaps without their bit", "v3", func(v *victim) {
			v.set64(offAutoclear, 0)
			v.set32(v.ext(extBitmaps), 0) // nobody looks any more
		}, nil, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := newVictim(t, c.image)
			c.poke(v)
			err := everything(t, v.b, layers.OpenOptions{Path: "image"})
			if c.class == nil {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantImageError(t, err, c.class, c.field)
		})
	}
}

// TestTablesWithoutEnd: a small file in which one L2 table is named so often
// that to walk through it all would take very long.
func TestTablesWithoutEnd(t *testing.T) {
	f := backend.NewMem("image")
	ctx := context.Background()
	if err := Create(ctx, f, CreateOptions{Size: 1 << 61, ClusterSize: 2 << 20}); err != nil {
		t.Fatal(err)
	}
	end, _ := f.Size()
	img, err := Open(ctx, f, layers.OpenOptions{Path: "image"})
	if err != nil {
		t.Fatal(err)
	}
	var entry [8]byte
	binary.BigEndian.PutUint64(entry[:], uint64(end))
	table := bytes.Repeat(entry[:], 100)
	if _, err := f.WriteAt(table, img.l1Off); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(end + 2<<20); err != nil {
		t.Fatal(err)
	}
	_, err = img.Describe(ctx)
	wantImageError(t, err, layers.ErrCorrupt, "L1 entry")
	err = img.WalkHost(ctx, func(layers.HostRange) error { return nil })
	wantImageError(t, err, layers.ErrCorrupt, "L1 entry")
}

// TestUnknownFeatureIsNamed: by the image's own table, else by number.
func TestUnknownFeatureIsNamed(t *testing.T) {
	f := backend.NewMem("image")
	if err := Create(context.Background(), f, CreateOptions{Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	v := &victim{b: f.Bytes()}
	var err error
	if v.h, err = parseHeader(v.b); err != nil {
		t.Fatal(err)
	}
	v.or(offIncompatible, 1<<40)
	err = everything(t, v.b, layers.OpenOptions{})
	if err == nil || !strings.Contains(err.Error(), "incompatible feature bit 40") {
		t.Error(err)
	}
	e := v.ext(extFeatureNames)
	v.b[e], v.b[e+1] = 0, 40
	copy(v.b[e+2:e+48], "quantum clusters\x00")
	err = everything(t, v.b, layers.OpenOptions{})
	if err == nil || !strings.Contains(err.Error(), "quantum clusters") {
		t.Error(err)
	}
}

// TestErrorNamesPlaceAndValue: file, offset, field, value.
func TestErrorNamesPlaceAndValue(t *testing.T) {
	v := newVictim(t, "v3")
	v.set64(v.at(1), 1<<40)
	err := everything(t, v.b, layers.OpenOptions{Path: "disk.qcow2"})
	var ie *layers.ImageError
	if !errors.As(err, &ie) || ie.Path != "disk.qcow2" || ie.Offset != v.at(1) || ie.Value != uint64(1<<40) {
		t.Errorf("%v", err)
	}
}

// TestWritableRefused: a corrupt an image is not opened for writing, and the
// error says why; a snapshot is never written.
func TestWritableRefused(t *testing.T) {
	v := newVictim(t, "v3")
	v.or(offIncompatible, incompatCorrupt)
	_, err := openBytes(t, v.b, layers.OpenOptions{Writable: true})
	wantImageError(t, err, layers.ErrCorrupt, "incompatible_features")
	v = newVictim(t, "v3")
	_, err = openBytes(t, v.b, layers.OpenOptions{Writable: true, Snapshot: "before"})
	wantImageError(t, err, layers.ErrUnsupported, "snapshot")
}

// TestDataFilePolicy: without a way to open it an external data file is
// refused, and the caller's refusal comes through.
func TestDataFilePolicy(t *testing.T) {
	b := golden(t, "data.qcow2")
	_, err := Open(context.Background(), backend.NewMemBytes("image", b), layers.OpenOptions{Path: "image"})
	wantImageError(t, err, layers.ErrUnsupported, "external data file name")
	_, err = Open(context.Background(), backend.NewMemBytes("image", b), layers.OpenOptions{
		Path:     "image",
		OpenFile: func(string, bool) (backend.File, error) { return nil, layers.ErrPolicy },
	})
	wantImageError(t, err, layers.ErrPolicy, "external data file name")
}

// TestReadOnlyWritesNothing: not one byte, not one call, whatever is asked,
// also of an image that is dirty and has unknown autoclear bits.
func TestReadOnlyWritesNothing(t *testing.T) {
	v := newVictim(t, "v3")
	v.or(offIncompatible, incompatDirty|incompatCorrupt)
	v.or(offAutoclear, 1<<40)
	f := &frozen{Mem: backend.NewMemBytes("image", v.b)}
	img, err := Open(context.Background(), f, layers.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	portrait(t, img)
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	if f.calls != 0 {
		t.Errorf("%d changing calls", f.calls)
	}
}

// frozen counts the calls that change a file or its durability.
type frozen struct {
	*backend.Mem
	calls int
}

func (f *frozen) WriteAt(p []byte, off int64) (int, error)               { f.calls++; return len(p), nil }
func (f *frozen) WritevAt(b [][]byte, off int64) (int, error)            { f.calls++; return 0, nil }
func (f *frozen) Truncate(int64) error                                   { f.calls++; return nil }
func (f *frozen) Sync() error                                            { f.calls++; return nil }
func (f *frozen) PunchHole(off, n int64) error                           { f.calls++; return nil }
func (f *frozen) ZeroRange(off, n int64) error                           { f.calls++; return nil }
func (f *frozen) CopyRange(_ backend.File, _, _, n int64) (int64, error) { f.calls++; return n, nil }
