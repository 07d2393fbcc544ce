package ploop

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/layers"
)

const k64 = 64 << 10

// sample is 16 clusters of 64 KiB (the last one partial) of which four are
// mapped, one slot of the file is free.
func sample(version int) []byte {
	step := uint32(1)
	if version == 1 {
		step = k64 / sectorSize
	}
	return rawImage(version, k64, 16*k64-512, map[int]uint32{0: 1 * step, 3: 2 * step, 4: 3 * step, 15: 5 * step}, 5)
}

func put32(off int, v uint32) func([]byte) []byte {
	return func(b []byte) []byte {
		binary.LittleEndian.PutUint32(b[off:], v)
		return b
	}
}

func put64(off int, v uint64) func([]byte) []byte {
	return func(b []byte) []byte {
		binary.LittleEndian.PutUint64(b[off:], v)
		return b
	}
}

func cut(n int) func([]byte) []byte { return func(b []byte) []byte { return b[:n] } }

func chainOf(steps ...func([]byte) []byte) func([]byte) []byte {
	return func(b []byte) []byte {
		for _, s := range steps {
			b = s(b)
		}
		return b
	}
}

// TestDamagedHeader: what Open must refuse, by class, and with the field's
// name in the message.
func TestDamagedHeader(t *testing.T) {
	for _, c := range []struct {
		name   string
		damage func([]byte) []byte
		class  error
		says   string
	}{
		{"empty file", cut(0), layers.ErrFormat, "header"},
		{"short header", cut(63), layers.ErrFormat, "header"},
		{"signature", put32(offSig, 0), layers.ErrFormat, "m_Sig"},
		{"type", put32(offType, 3), layers.ErrFormat, "m_Type"},
		{"cluster 0", put32(offSectors, 0), layers.ErrFormat, "m_Sectors"},
		{"cluster 3 MiB", put32(offSectors, 6144), layers.ErrUnsupported, "m_Sectors"},
		{"cluster 128 MiB", put32(offSectors, 1<<18), layers.ErrUnsupported, "m_Sectors"},
		{"cluster huge", put32(offSectors, 1<<31), layers.ErrUnsupported, "m_Sectors"},
		{"size overflows", put64(offSize, 1<<63), layers.ErrFormat, "m_SizeInSectors"},
		{"BAT too small", put32(offBATEntries, 15), layers.ErrFormat, "m_Size"},
		{"BAT into the data", put32(offBATEntries, k64/4), layers.ErrCorrupt, "m_FirstBlockOffset"},
		{"first block 0", put32(offFirstBlock, 0), layers.ErrCorrupt, "m_FirstBlockOffset"},
		{"first block unaligned", put32(offFirstBlock, 129), layers.ErrCorrupt, "m_FirstBlockOffset"},
		{"first block behind the file", put32(offFirstBlock, 0xffffff80), layers.ErrCorrupt, "m_FirstBlockOffset"},
		{"BAT cut off", cut(k64 - 1), layers.ErrCorrupt, "m_FirstBlockOffset"},
		{"converting", put32(offFlags, flagConverting), layers.ErrCorrupt, ".idx"},
		{"huge BAT", chainOf(put32(offBATEntries, 0xffffffff), put32(offFirstBlock, 0xffffff80)), layers.ErrCorrupt, "m_FirstBlockOffset"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, writable := range []bool{false, true} {
				b := c.damage(sample(2))
				_, m, err := openBytes(b, writable)
				if !errors.Is(err, c.class) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "img.hds") {
					t.Errorf("writable %v: %v, want %v naming %s", writable, err, c.class, c.says)
				}
				if !bytes.Equal(m.Bytes(), b) {
					t.Error("the refused file was changed")
				}
			}
		})
	}
}

// TestDamagedEntries: entries that may not be followed, met by a read, by a
// walk and by a writer. The undamaged part stays readable.
func TestDamagedEntries(t *testing.T) {
	entry := func(idx int) int { return headerSize + 4*idx }
	for _, c := range []struct {
		name    string
		version int
		damage  func([]byte) []byte
		idx     int64 // the bad entry, that Lookup meets
		says    string
	}{
		{"behind the end", 2, put32(entry(7), 6), 7, "BAT[7]"},
		{"far behind the end", 2, put32(entry(7), 0xffffffff), 7, "behind the end"},
		{"behind the end v1", 1, put32(entry(7), 0xffffff80), 7, "behind the end"},
		{"unaligned v1", 1, put32(entry(7), 129), 7, "multiple of the cluster"},
		{"into the BAT v1", 1, put32(entry(7), 127), 7, "multiple of the cluster"},
		{"into the data area's front", 2, chainOf(put32(offFirstBlock, 256)), 0, "into the header or the BAT"},
		{"last cluster cut off", 2, cut(6*k64 - 1), 15, "cut off"},
		{"last cluster gone", 2, cut(5 * k64), 15, "behind the end"},
		{"second of a run", 2, cut(3*k64 + 5), 4, "BAT[4]"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx := context.Background()
			b := c.damage(sample(c.version))
			i, _, err := openBytes(b, false)
			if err != nil {
				t.Fatal(err)
			}
			bad := func(what string, err error) {
				t.Helper()
				var ie *layers.ImageError
				if !errors.Is(err, layers.ErrCorrupt) || !errors.As(err, &ie) || !strings.Contains(err.Error(), c.says) {
					t.Errorf("%s: %v, want ErrCorrupt with %q", what, err, c.says)
				} else if ie.Offset != headerSize+4*c.idx {
					t.Errorf("%s: names offset %#x", what, ie.Offset)
				}
			}
			_, err = i.Lookup(ctx, 0, i.Size(), nil)
			if err == nil {
				// dst had room for one extent only: ask for the bad one.
				_, err = i.Lookup(ctx, c.idx*k64, 1, nil)
			}
			bad("Lookup", err)
			if _, err := i.Lookup(ctx, 9*k64, k64, nil); err != nil {
				t.Errorf("undamaged range: %v", err)
			}
			bad("WalkHost", i.WalkHost(ctx, func(layers.HostRange) error { return nil }))
			_, err = i.Describe(ctx)
			bad("Describe", err)

			// A writer notices before it allocates or releases.
			i, m, err := openBytes(b, true)
			if err != nil {
				t.Fatal(err)
			}
			data := bytes.Clone(m.Bytes()[headerSize:])
			bad("WriteAt", i.WriteAt(ctx, make([]byte, 100), 8*k64, bytesBelow(nil)))
			if !bytes.Equal(m.Bytes()[headerSize:], data) {
				t.Error("WriteAt changed a damaged image")
			}
			// Marked as in use, it is refused at once.
			b = put32(offInUse, inUseOpen)(b)
			_, m, err = openBytes(b, true)
			bad("writable open after a crash", err)
			if !bytes.Equal(m.Bytes(), b) {
				t.Error("the refused file was changed")
			}
			if _, _, err := openBytes(b, false); err != nil {
				t.Errorf("read-only open after a crash: %v", err)
			}
		})
	}
}

// TestCrashedImageIsVerified: what only a scan of the whole BAT can find.
func TestCrashedImageIsVerified(t *testing.T) {
	for _, c := range []struct {
		name   string
		damage func([]byte) []byte
		says   string
	}{
		{"duplicate", put32(headerSize+4*9, 2), "BAT[9]"},
		{"duplicate inside a run", put32(headerSize+4*9, 3), "BAT[9]"},
		{"behind the disk", chainOf(put32(offBATEntries, 20), put32(headerSize+4*18, 4)), "BAT[18]"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := c.damage(sample(2))
			if _, _, err := openBytes(b, true); err != nil {
				t.Errorf("closed image: %v", err)
			}
			_, _, err := openBytes(put32(offInUse, inUseOpen)(b), true)
			if !errors.Is(err, layers.ErrCorrupt) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("after a crash: %v", err)
			}
			i, _, err := openBytes(put32(offInUse, inUseClosed)(b), true)
			if err != nil {
				t.Fatal(err)
			}
			if err := i.WriteAt(context.Background(), []byte{1}, 8*k64, bytesBelow(nil)); !errors.Is(err, layers.ErrCorrupt) {
				t.Errorf("allocation in a damaged image: %v", err)
			}
			if err := i.ZeroAt(context.Background(), 0, k64, true, bytesBelow(nil)); !errors.Is(err, layers.ErrCorrupt) {
				t.Errorf("release in a damaged image: %v", err)
			}
		})
	}
	// Sane: taken over, ragged tail and leaked slot put right, closed.
	b := append(put32(offInUse, inUseOpen)(sample(2)), 1, 2, 3)
	i, m, err := openBytes(b, true)
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, i.Size())
	readLayer(t, i, want, 0)
	i.f = keep{m}
	if err := i.Close(); err != nil {
		t.Fatal(err)
	}
	checkFile(t, m, true)
	i = mustOpen(t, keep{m}, false, nil)
	got := make([]byte, i.Size())
	readLayer(t, i, got, 0)
	sameBytes(t, "after recovery", got, want)
}

// TestHeaderOfVersion1: the high half of the size is not part of it.
func TestHeaderOfVersion1(t *testing.T) {
	i, _, err := openBytes(put32(offSize+4, 0xdeadbeef)(sample(1)), false)
	if err != nil || i.Size() != 16*k64-512 || i.Version() != 1 {
		t.Errorf("size %d, %v", i.Size(), err)
	}
}

// TestReadOnlyOpenChangesNothing, and refuses changes.
func TestReadOnlyOpenChangesNothing(t *testing.T) {
	ctx := context.Background()
	b := withExtension(sample(2))
	i, m, err := openBytes(b, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := i.WriteAt(ctx, []byte{1}, 0, bytesBelow(nil)); !errors.Is(err, layers.ErrReadOnly) {
		t.Errorf("WriteAt: %v", err)
	}
	if err := i.ZeroAt(ctx, 0, 1, true, bytesBelow(nil)); !errors.Is(err, layers.ErrReadOnly) {
		t.Errorf("ZeroAt: %v", err)
	}
	if err := i.Sync(ctx); !errors.Is(err, layers.ErrReadOnly) {
		t.Errorf("Sync: %v", err)
	}
	if _, err := i.Describe(ctx); err != nil {
		t.Error(err)
	}
	closeImage(t, i)
	if !bytes.Equal(m.Bytes(), b) {
		t.Error("file changed")
	}
}

// TestOddSizesAreReadOnly: QEMU makes clusters that ploop does not take.
func TestOddSizesAreReadOnly(t *testing.T) {
	b := rawImage(2, 4096, 1<<20, map[int]uint32{3: 2}, 2)
	if _, _, err := openBytes(b, false); err != nil {
		t.Error(err)
	}
	if _, _, err := openBytes(b, true); !errors.Is(err, layers.ErrUnsupported) {
		t.Errorf("writable: %v", err)
	}
}

// TestWrongEmptyFlag: readers do not need CIF_Empty, and the first writer puts
// it right, in both directions.
func TestWrongEmptyFlag(t *testing.T) {
	ctx := context.Background()
	i, m, err := openBytes(put32(offFlags, flagEmpty)(sample(2)), true)
	if err != nil {
		t.Fatal(err)
	}
	i.f = keep{m}
	if ext, err := i.Lookup(ctx, 0, k64, nil); err != nil || ext[0].Host == 0 {
		t.Errorf("%v, %v", ext, err)
	}
	if err := i.WriteAt(ctx, []byte{1}, 0, bytesBelow(nil)); err != nil {
		t.Fatal(err)
	}
	closeImage(t, i)
	checkFile(t, m, true)
	i, m, err = openBytes(rawImage(2, k64, 16*k64, nil, 0), true)
	if err != nil {
		t.Fatal(err)
	}
	i.f = keep{m}
	if _, err := m.WriteAt(make([]byte, 4), offFlags); err != nil {
		t.Fatal(err)
	}
	i.state.flags = 0
	if err := i.ZeroAt(ctx, 0, 1, true, bytesBelow(nil)); err != nil {
		t.Fatal(err)
	}
	closeImage(t, i)
	checkFile(t, m, false)
}
