package fsck

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"pgregory.net/rapid"

	"github.com/imagestack/imagestack/backend"
)

// model is a plan as one array a phase; nil bytes are unchanged.
type model struct {
	old   []byte
	size  int64
	copyd map[int64]byte
	zero  [numPhases]map[int64]bool
	punch map[int64]bool
	bytes [numPhases]map[int64]byte
}

func (m *model) content() []byte {
	b := make([]byte, m.size)
	copy(b, m.old)
	for i, v := range m.copyd {
		b[i] = v
	}
	for ph := range numPhases {
		for i := range m.zero[ph] {
			b[i] = 0
		}
		if ph == PhaseFree {
			for i := range m.punch {
				if i < m.size {
					b[i] = 0
				}
			}
		}
		for i, v := range m.bytes[ph] {
			b[i] = v
		}
	}
	return b
}

// randomPlan draws a plan for a file and its model.
func randomPlan(t *rapid.T, f backend.File, old []byte, o PlanOptions) (*Plan, *model) {
	p, err := NewPlan(f, o)
	if err != nil {
		t.Fatal(err)
	}
	m := &model{old: old, size: int64(len(old)), copyd: map[int64]byte{}, punch: map[int64]bool{}}
	for i := range m.zero {
		m.zero[i], m.bytes[i] = map[int64]bool{}, map[int64]byte{}
	}
	const unit = 512
	n := int64(len(old)) / unit
	grow := rapid.Int64Range(0, 8).Draw(t, "grow")
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	grown := func(end int64) { m.size = max(m.size, end) }
	for range rapid.IntRange(1, 12).Draw(t, "ops") {
		ph := Phase(rapid.IntRange(0, int(numPhases)-1).Draw(t, "phase"))
		switch rapid.IntRange(0, 3).Draw(t, "op") {
		case 0, 1:
			off := rapid.Int64Range(0, (n+grow)*unit-1).Draw(t, "off")
			b := rapid.SliceOfN(rapid.Byte(), 1, 40).Draw(t, "bytes")
			must(p.Write(ph, off, b))
			for i, v := range b {
				m.bytes[ph][off+int64(i)] = v
			}
			grown(off + int64(len(b)))
		case 2:
			off := rapid.Int64Range(0, n+grow-1).Draw(t, "zero") * unit
			k := rapid.Int64Range(1, 4).Draw(t, "sectors") * unit
			must(p.Zero(ph, off, k))
			for i := off; i < off+k; i++ {
				m.zero[ph][i] = true
			}
			grown(off + k)
		case 3:
			off := rapid.Int64Range(0, n-1).Draw(t, "punch") * unit
			must(p.Punch(off, unit))
			for i := off; i < off+unit; i++ {
				m.punch[i] = true
			}
		}
	}
	// Sources are in the first half, destinations in the other.
	for range rapid.IntRange(0, 3).Draw(t, "copies") {
		src := rapid.Int64Range(0, n/2-2).Draw(t, "src") * unit
		dst := rapid.Int64Range(n/2, n+grow).Draw(t, "dst") * unit
		k := rapid.Int64Range(1, 2).Draw(t, "len") * unit
		if err := p.Copy(dst, src, k); errors.Is(err, ErrPlan) {
			continue // twice the same destination
		} else if err != nil {
			t.Fatal(err)
		}
		for i := range k {
			m.copyd[dst+i] = old[src+i]
		}
		grown(dst + k)
	}
	if rapid.Bool().Draw(t, "size") {
		to := rapid.Int64Range(8*unit, m.size+3*unit).Draw(t, "to")
		switch err := p.SetSize(to); {
		case errors.Is(err, ErrPlan):
		case err != nil:
			t.Fatal(err)
		default:
			m.size = to
		}
	}
	return p, m
}

func randomFile(t *rapid.T) []byte {
	n := rapid.IntRange(16, 60).Draw(t, "sectors") * 512
	old := make([]byte, n)
	for i := range old {
		old[i] = byte(i*7 + i/256 + 1)
	}
	return old
}

func TestPlanView(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		old := randomFile(t)
		f := backend.NewMemBytes("image", old)
		limit := int64(rapid.SampledFrom([]int{0, 1, 3 * pageBytes}).Draw(t, "memory"))
		p, m := randomPlan(t, f, old, PlanOptions{Memory: limit})
		defer p.Close()
		want := m.content()
		if n, _ := p.Size(); n != int64(len(want)) {
			t.Fatalf("size %d, want %d", n, len(want))
		}
		got := make([]byte, len(want)+10)
		n, err := p.ReadAt(got, 0)
		if !errors.Is(err, io.EOF) || n != len(want) || !bytes.Equal(got[:n], want) {
			t.Fatalf("%d bytes, %v", n, err)
		}
		for range 10 {
			off := rapid.IntRange(0, max(0, len(want)-1)).Draw(t, "off")
			k := rapid.IntRange(0, len(want)-off).Draw(t, "n")
			if _, err := p.ReadAt(got[:k], int64(off)); k > 0 && (err != nil || !bytes.Equal(got[:k], want[off:off+k])) {
				t.Fatalf("read of %d at %d: wrong content, %v", k, off, err)
			}
		}
		if !bytes.Equal(f.Bytes(), old) {
			t.Fatal("the file has changed")
		}
	})
}

func TestPlanBounds(t *testing.T) {
	f := backend.NewMemBytes("image", make([]byte, 8192))
	p, err := NewPlan(f, PlanOptions{MaxSize: 8192})
	if err != nil {
		t.Fatal(err)
	}
	if !p.Empty() {
		t.Error("not empty")
	}
	for what, err := range map[string]error{
		"write":   p.Write(PhaseMap, 8190, []byte("abc")),
		"zero":    p.Zero(PhaseMap, 8192, 1),
		"copy":    p.Copy(8000, 0, 512),
		"setsize": p.SetSize(9000),
	} {
		if !errors.Is(err, ErrNoRoom) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for what, err := range map[string]error{
		"negative": p.Write(PhaseMap, -1, nil),
		"phase":    p.Write(numPhases, 0, nil),
		"overflow": p.Zero(PhaseMap, 1<<62, 1<<62),
		"punch":    p.Punch(8000, 1000),
		"source":   p.Copy(0, -5, 10),
	} {
		if !errors.Is(err, ErrPlan) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := errors.Join(p.Copy(512, 0, 512), p.SetSize(4096)); err != nil {
		t.Fatal(err)
	}
	if err := p.Copy(0, 4096, 513); !errors.Is(err, ErrPlan) {
		t.Errorf("overlapping copy: %v", err)
	}
	if err := p.Write(PhaseMap, 4090, make([]byte, 10)); !errors.Is(err, ErrPlan) {
		t.Errorf("write behind the new end: %v", err)
	}
	if err := p.SetSize(1000); !errors.Is(err, ErrPlan) {
		t.Errorf("end before a change: %v", err)
	}
	if p.Empty() {
		t.Error("empty")
	}
	if err := p.Replace([]byte("x")); !errors.Is(err, ErrPlan) {
		t.Errorf("replace: %v", err)
	}
}
