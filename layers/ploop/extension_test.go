package ploop

import (
	"bytes"
	"context"
	"crypto/md5"
	"encoding/binary"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/layers"
)

// withExtension appends to an image of 64 KiB clusters an extension with an
// unknown feature and a dirty bitmap, and one cluster of its bits. The image
// is closed as software does that keeps the bitmap up to date.
func withExtension(b []byte) []byte { return extended(b, 0x1234) }

// extended is withExtension with another feature in front, 0 for none.
func extended(b []byte, feature uint64) []byte {
	le := binary.LittleEndian
	at := len(b)
	ext := make([]byte, k64)
	le.PutUint64(ext, extMagic)
	p := ext[extHead:]
	if feature != 0 {
		le.PutUint64(p, feature)
		le.PutUint32(p[16:], 5) // padded to 8
		p = p[featureHead+8:]
	}
	le.PutUint64(p, bitmapMagic)
	le.PutUint32(p[16:], bitmapHead+8)
	p = p[featureHead:]
	le.PutUint64(p, uint64(16*k64/sectorSize-1))
	copy(p[8:24], "0123456789abcdef")
	le.PutUint32(p[24:], 128) // sectors for one bit
	le.PutUint32(p[28:], 1)
	le.PutUint64(p[32:], uint64(at+k64)/sectorSize)
	sum := md5.Sum(ext[extHead:])
	copy(ext[8:], sum[:])
	b = append(b, ext...)
	b = append(b, bytes.Repeat([]byte{0xaa}, k64)...)
	le.PutUint64(b[offExtension:], uint64(at)/sectorSize)
	le.PutUint32(b[offInUse:], inUseV21)
	return b
}

func TestExtensionIsReported(t *testing.T) {
	ctx := context.Background()
	b := withExtension(sample(2))
	i, _, err := openBytes(b, false)
	if err != nil {
		t.Fatal(err)
	}
	info, err := i.Describe(ctx)
	if err != nil || len(info.Bitmaps) != 1 || info.Bitmaps[0].Granularity != k64 || len(info.Flags) != 0 || info.UsedClusters != 4 {
		t.Errorf("%+v, %v", info, err)
	}
	var roles []layers.Role
	var covered int64
	if err := i.WalkHost(ctx, func(r layers.HostRange) error {
		roles = append(roles, r.Role)
		covered += r.Len
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	want := []layers.Role{layers.RoleHeader, layers.RoleMap, layers.RoleData, layers.RoleData, layers.RoleData, layers.RoleExtension, layers.RoleBitmap}
	if !slices.Equal(roles, want) || covered != int64(len(b))-k64 { // one slot is free
		t.Errorf("roles %v covering %d of %d", roles, covered, len(b))
	}
}

// TestExtensionInQemu: what this package takes for an extension is one for
// QEMU, which checks its sum and its place and refuses it otherwise.
func TestExtensionInQemu(t *testing.T) {
	imgtest.Require(t, "qemu-img")
	path := tempPath(t, "ext.hds")
	for _, c := range []struct {
		damage func([]byte) []byte
		ok     bool
	}{
		{func(b []byte) []byte { return b }, true},
		{put64(len(sample(2))+8, 1), false},
	} {
		if err := os.WriteFile(path, c.damage(extended(sample(2), 0)), 0o600); err != nil {
			t.Fatal(err)
		}
		exit, out := imgtest.Try(t, "qemu-img", "map", "-f", "parallels", path)
		if (exit == 0) != c.ok {
			t.Errorf("qemu-img map: exit %d, %s", exit, out)
		}
		i := openFile(t, path, false)
		_, err := i.readExtension(i.state.extension)
		if (err == nil) != c.ok {
			t.Errorf("readExtension: %v", err)
		}
		closeImage(t, i)
	}
}

func TestDamagedExtension(t *testing.T) {
	at := len(sample(2))
	sum := func(b []byte) []byte {
		s := md5.Sum(b[at+extHead : at+k64])
		copy(b[at+8:], s[:])
		return b
	}
	feature := at + extHead + featureHead + 8
	for _, c := range []struct {
		name   string
		damage func([]byte) []byte
		says   string
	}{
		{"unaligned", put64(offExtension, 129), "m_FormatExtensionOffset"},
		{"into the BAT", chainOf(put32(offFirstBlock, 256), put64(offExtension, 128)), "BAT"},
		{"behind the file", put64(offExtension, 1<<40), "m_FormatExtensionOffset"},
		{"overflow", put64(offExtension, 1<<63), "m_FormatExtensionOffset"},
		{"magic", put64(at, 1), "magic"},
		{"checksum", put64(at+8, 1), "checksum"},
		{"feature size", chainOf(put32(at+extHead+16, 0xfffffff0), sum), "feature size"},
		{"bitmap too short", chainOf(put32(feature+16, 31), sum), "too short"},
		{"bitmap table", chainOf(put32(feature+featureHead+28, 4), sum), "l1_size"},
		{"bitmap granularity", chainOf(put32(feature+featureHead+24, 0), sum), "granularity"},
		{"bits behind the file", chainOf(put64(feature+featureHead+32, 1<<60), sum), "dirty bitmap l1"},
		{"bits unaligned", chainOf(put64(feature+featureHead+32, 129), sum), "multiple"},
		{"bits in the BAT", chainOf(put32(offFirstBlock, 256), put64(feature+featureHead+32, 128), sum), "BAT"},
	} {
		t.Run(c.name, func(t *testing.T) {
			i, _, err := openBytes(c.damage(withExtension(sample(2))), false)
			if err != nil {
				t.Fatal(err)
			}
			_, err = i.readExtension(i.state.extension)
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v, want %q", err, c.says)
			}
		})
	}
	// All clear and all set are values, not places.
	for v := range uint64(2) {
		i, _, err := openBytes(chainOf(put64(feature+featureHead+32, v), sum)(withExtension(sample(2))), false)
		if err != nil {
			t.Fatal(err)
		}
		if ext, err := i.readExtension(i.state.extension); err != nil || len(ext.bitmaps) != 1 || len(ext.bitmaps[0].clusters) != 0 {
			t.Errorf("l1 entry %d: %+v, %v", v, ext, err)
		}
	}
	i, _, err := openBytes(put64(at, 1)(withExtension(sample(2))), false)
	if err != nil {
		t.Fatal(err)
	}
	info, err := i.Describe(context.Background())
	if err != nil || !slices.Contains(info.Flags, "extension-damaged") {
		t.Errorf("%+v, %v", info, err)
	}
}

// TestExtensionIsDropped: the first change of a writable image drops the
// offset and the clusters; opening it alone changes nothing.
func TestExtensionIsDropped(t *testing.T) {
	ctx := context.Background()
	b := withExtension(sample(2))
	i, m, err := openBytes(b, true)
	if err != nil {
		t.Fatal(err)
	}
	closeImage(t, i)
	if !bytes.Equal(m.Bytes(), b) {
		t.Error("changed without a change")
	}
	i, m, err = openBytes(b, true)
	if err != nil {
		t.Fatal(err)
	}
	i.f = keep{m}
	if err := i.WriteAt(ctx, []byte{1, 2, 3}, 1, bytesBelow(nil)); err != nil {
		t.Fatal(err)
	}
	h, err := parseHeader(m.Bytes(), "x")
	if err != nil || h.extension != 0 || h.inUse != inUseOpen {
		t.Errorf("before the first change: %+v %v", h, err)
	}
	// Three slots are free now: the leak of the sample, extension and bits.
	if err := i.WriteAt(ctx, bytes.Repeat([]byte{9}, 3*k64), 6*k64, bytesBelow(nil)); err != nil {
		t.Fatal(err)
	}
	closeImage(t, i)
	checkFile(t, m, false)
	if size, _ := m.Size(); size != int64(len(b)) {
		t.Errorf("length %d, want %d as before", size, len(b))
	}
}
