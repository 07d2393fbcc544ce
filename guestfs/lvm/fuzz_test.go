package lvm

import (
	"testing"
)

// FuzzText decodes any text as the metadata of a physical volume of 64 MiB.
func FuzzText(f *testing.F) {
	f.Add(fill())
	f.Add(fill("LVS", `s { `+visible+seg(`type = "snapshot" origin = "root"`)))
	f.Add(fill("LVS", `s { `+visible+seg(`type = "striped" stripe_count = 2 stripes = ["pv0", 20, "pv0", 30]`)))
	h := header{uuid: "gWR397PYo0TKKZPutEIGM38CZFgzNhRs", size: 64 * mib, data: area{mib, 63 * mib}, texts: []area{{4096, mib - 4096}}}
	f.Fuzz(func(t *testing.T, text string) {
		root, err := parse([]byte(text))
		if err != nil {
			return
		}
		pv, err := decode([]*Volume{{header: h}}, root)
		if err != nil {
			return
		}
		last := int64(mib)
		for _, r := range pv.Free {
			if r.Off < last || r.Len <= 0 || r.End() > 64*mib {
				t.Errorf("free: %v", pv.Free)
			}
			last = r.End()
		}
		for _, lv := range pv.LVs {
			for _, p := range lv.Pieces {
				if p.At < mib || p.Len <= 0 || p.At+p.Len > 64*mib || p.Off+p.Len > lv.Size {
					t.Errorf("pieces: %v", lv.Pieces)
				}
			}
		}
	})
}

// FuzzPV reads the first bytes of a physical volume, whose checksums are
// right where they are.
func FuzzPV(f *testing.F) {
	base := image(fill())[:2*mib]
	f.Add(uint32(sector+72), byte(1), uint32(4096+48), byte(2))
	f.Fuzz(func(_ *testing.T, a uint32, x byte, c uint32, y byte) {
		i, k := a%(8*sector), 4096+c%areaHead
		old, older := base[i], base[k]
		base[i] ^= x
		base[k] ^= y
		_, _ = read(base) // it must not panic
		base[k], base[i] = older, old
	})
}
