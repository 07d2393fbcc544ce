package qcow2

import (
	"bytes"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/imagestack/imagestack/backend"
)

// TestHeaderRoundTrip: unknown fields, unknown extensions and even their
// padding come back byte for byte.
func TestHeaderRoundTrip(t *testing.T) {
	h := Header{
		Version: 3, BackingOffset: 600, ClusterBits: 12, Size: 12345, L1Size: 3, L1Offset: 1 << 12,
		RefcountTableOffset: 2 << 12, RefcountTableClusters: 1, NbSnapshots: 4, SnapshotsOffset: 9 << 12,
		Incompatible: 1 << 63, Compatible: 1 << 62, Autoclear: 1 << 61, RefcountOrder: 6,
		HeaderLength: 136, Tail: append([]byte{0}, "31 bytes of an unknown future.."...),
		Extensions: []Extension{
			{Type: 0x12345678, Data: []byte("unknown"), Pad: []byte{0xaa}},
			{Type: extBackingFormat, Data: []byte("raw")},
			{Type: 0x9abcdef0},
			{Type: extDataFile, Data: []byte("12345678")},
		},
		BackingName: "../base\xff\x00.img",
	}
	b, err := h.marshal()
	if err != nil {
		t.Fatal(err)
	}
	p, err := parseHeader(b)
	if err != nil {
		t.Fatal(err)
	}
	again, err := p.marshal()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b, again) {
		t.Error(cmp.Diff(b, again))
	}
	if p.BackingName != h.BackingName || p.BackingOffset != 600 || !bytes.Equal(p.Extensions[0].Pad, []byte{0xaa}) ||
		len(p.Extensions) != 4 || !bytes.Equal(p.Tail, h.Tail) || p.SnapshotsOffset != h.SnapshotsOffset {
		t.Errorf("%+v", p)
	}
}

// TestHeaderOfGoldenImages: what QEMU wrote survives.
func TestHeaderOfGoldenImages(t *testing.T) {
	for _, name := range goldenImages {
		b := golden(t, name+".qcow2")
		h, err := parseHeader(b)
		if err != nil {
			t.Fatal(err)
		}
		out, err := h.marshal()
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(out, b[:len(out)]) {
			t.Errorf("%s: %s", name, cmp.Diff(b[:len(out)], out))
		}
	}
}

// TestPutHeaderFields: each helper changes its fields and nothing else.
func TestPutHeaderFields(t *testing.T) {
	orig := golden(t, "v3.qcow2")
	for name, c := range map[string]struct {
		put  func(backend.File) error
		want func(*Header)
	}{
		"64":    {func(f backend.File) error { return putHeader64(f, offAutoclear, 5) }, func(h *Header) { h.Autoclear = 5 }},
		"table": {func(f backend.File) error { return putTableRef(f, 1<<20, 9) }, func(h *Header) { h.RefcountTableOffset, h.RefcountTableClusters = 1<<20, 9 }},
	} {
		f := backend.NewMemBytes("image", orig)
		if err := c.put(f); err != nil {
			t.Fatal(err)
		}
		got, err := parseHeader(f.Bytes())
		if err != nil {
			t.Fatal(err)
		}
		want, _ := parseHeader(orig)
		c.want(want)
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s: %s", name, d)
		}
	}
}

// TestHeaderCuts: every prefix of an image is an error or a header, never a
// panic.
func TestHeaderCuts(t *testing.T) {
	b := golden(t, "v3.qcow2")
	for n := range 600 {
		if h, err := parseHeader(b[:n]); err == nil && n < int(h.HeaderLength) {
			t.Errorf("%d bytes are a header of %d", n, h.HeaderLength)
		}
	}
}

func TestPackedDescriptor(t *testing.T) {
	for bits := uint(minClusterBits); bits <= maxClusterBits; bits++ {
		for _, off := range []uint64{1, 511, 512, 513, 70000, 1<<40 + 77} {
			for _, n := range []uint32{1, 2, 511, 512, 513, 1<<bits - 1} {
				e, ok := encodePacked(off, n, bits)
				if !ok {
					t.Fatalf("bits %d off %d len %d does not fit", bits, off, n)
				}
				d := decodePacked(e, bits)
				if end := off + uint64(d.len); d.off != off || d.len < n || end%512 != 0 || d.len >= n+512 {
					t.Errorf("bits %d off %d len %d: %+v", bits, off, n, d)
				}
			}
		}
		// The field is as wide as the specification says, and no wider.
		if d := decodePacked(entryCompressed|descriptorBits, bits); int64(d.len) > 2<<bits {
			t.Errorf("bits %d: %d bytes", bits, d.len)
		}
		if _, ok := encodePacked(1<<56, 1, bits); ok {
			t.Errorf("bits %d: an offset with reserved bits", bits)
		}
		if _, ok := encodePacked(1, 2<<bits+1, bits); ok {
			t.Errorf("bits %d: too long", bits)
		}
	}
}
