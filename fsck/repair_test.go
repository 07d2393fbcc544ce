package fsck

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"regexp"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
)

var (
	toyBad  = Register("toy.byte.bad", Damage, "A byte is 0xff.", "It becomes 0.")
	toyHigh = Register("toy.byte.high", Leak, "A byte is 0xfe.", "It becomes 1, and nothing is lost.")
	toyNote = Register("toy.byte.odd", Note, "A byte is 0xfd.", "Nothing.")
	toyBoom = Register("toy.byte.hopeless", Fatal, "A byte is 0xfc.", "Nothing helps.")
)

// toy checks that no byte is as its codes say. layered makes it see only the
// first bad page at a time, so that several rounds are needed.
type toy struct{ layered bool }

func (toy) Format() string { return "toy" }

func (c toy) Check(_ context.Context, f backend.File, o Options, sink Sink) (Stats, error) {
	size, err := o.Reader(f).Size()
	if err != nil {
		return Stats{}, err
	}
	b := make([]byte, size)
	if err := readZero(o.Reader(f), b, 0); err != nil {
		return Stats{}, err
	}
	for i, v := range b {
		at := int64(i)
		sink.Progress(1, at, size)
		fd := Finding{Place: Place{Offset: at, Field: "byte", Value: v}, Text: "as it should not be"}
		var to byte
		switch v {
		case 0xff:
			fd.Code, fd.Fix = toyBad, &Fix{Text: "clear it", Level: Full, Loses: fd.Guest}
		case 0xfe:
			fd.Code, fd.Fix, to = toyHigh, &Fix{Text: "make it 1", Level: Preen}, 1
		case 0xfd:
			fd.Code = toyNote
		case 0xfc:
			fd.Code = toyBoom
		default:
			continue
		}
		if sink.Report(fd) {
			if err := o.Plan.Write(PhaseMap, at, []byte{to}); err != nil {
				return Stats{}, err
			}
		}
		if c.layered && fd.Fix != nil {
			break
		}
	}
	return Stats{Format: "toy", VirtualSize: size}, nil
}

func TestRepair(t *testing.T) {
	content := bytes.Repeat([]byte{7}, 9000)
	content[10], content[5000], content[5001], content[8999], content[100] = 0xff, 0xfe, 0xfd, 0xfe, 0xff
	for _, c := range []struct {
		name          string
		decide        Decide
		layered       bool
		worst, remain Severity
		fixed         int64
		want          map[int]byte // what has changed
	}{
		{"check", nil, false, Damage, Damage, 0, nil},
		{"no", DecideNo, false, Damage, Damage, 0, nil},
		{"preen", DecidePreen, false, Damage, Damage, 2, map[int]byte{5000: 1, 8999: 1}},
		{"all", DecideAll, false, Note, Note, 4, map[int]byte{10: 0, 100: 0, 5000: 1, 8999: 1}},
		{"all, in rounds", DecideAll, true, 0, 0, 4, map[int]byte{10: 0, 100: 0, 5000: 1, 8999: 1}},
		{"one", func(f Finding) bool { return f.Place.Offset == 100 }, false, Damage, Damage, 1, map[int]byte{100: 0}},
	} {
		t.Run(c.name, func(t *testing.T) {
			f, undo := backend.NewMemBytes("image", content), backend.NewMem("undo")
			res, err := Repair(t.Context(), toy{c.layered}, f, RepairOptions{
				Decide: c.decide, Undo: func() (backend.File, error) { return undo, nil },
			})
			if err != nil {
				t.Fatal(err)
			}
			if c.layered {
				// The note in the middle shows up in the end.
				c.worst, c.remain = Note, Note
			}
			if res.Changed != (c.want != nil) || res.Fixed() != c.fixed || res.Left.Worst() != c.worst || res.Left.Remaining() != c.remain {
				t.Errorf("changed %v, fixed %d, worst %v, remaining %v", res.Changed, res.Fixed(), res.Left.Worst(), res.Left.Remaining())
			}
			want := bytes.Clone(content)
			for i, v := range c.want {
				want[i] = v
			}
			if !bytes.Equal(f.Bytes(), want) {
				t.Error("wrong content")
			}
			if c.want == nil {
				if n, _ := undo.Size(); n != 0 {
					t.Error("an undo file without need")
				}
				return
			}
			if _, err := ApplyUndo(t.Context(), undo, f, UndoOptions{}); err != nil || !bytes.Equal(f.Bytes(), content) {
				t.Errorf("undo: %v", err)
			}
		})
	}
}

// A fix that the plan does not hold is a defect that is not passed over.
func TestRepairUnmet(t *testing.T) {
	f := backend.NewMemBytes("image", []byte{1})
	_, err := Repair(t.Context(), liar{}, f, RepairOptions{Decide: DecideAll})
	if !errors.Is(err, ErrPlan) {
		t.Error(err)
	}
}

type liar struct{}

func (liar) Format() string { return "liar" }

func (liar) Check(_ context.Context, _ backend.File, _ Options, sink Sink) (Stats, error) {
	sink.Report(Finding{Code: toyBad, Fix: &Fix{Text: "x", Level: Full}})
	return Stats{}, nil
}

// A checker that always finds something ends, too.
func TestRepairEnds(t *testing.T) {
	f := backend.NewMemBytes("image", []byte{1})
	undo := backend.NewMem("undo")
	res, err := Repair(t.Context(), restless{}, f, RepairOptions{Decide: DecideAll, Undo: func() (backend.File, error) { return undo, nil }})
	if err != nil || res.Left.Remaining() != Damage || len(res.Later) != maxRounds-1 {
		t.Fatalf("%+v %v", res, err)
	}
	if _, err := ApplyUndo(t.Context(), undo, f, UndoOptions{}); err != nil || f.Bytes()[0] != 1 {
		t.Error(err)
	}
}

type restless struct{}

func (restless) Format() string { return "restless" }

func (restless) Check(_ context.Context, f backend.File, o Options, sink Sink) (Stats, error) {
	var b [1]byte
	if _, err := o.Reader(f).ReadAt(b[:], 0); err != nil {
		return Stats{}, err
	}
	if sink.Report(Finding{Code: toyBad, Fix: &Fix{Text: "x", Level: Full}}) {
		return Stats{}, o.Plan.Write(PhaseMap, 0, []byte{b[0] + 1})
	}
	return Stats{}, nil
}

func TestCollectorBounds(t *testing.T) {
	col := NewCollector(CollectorOptions{File: "f", Details: 5, Decide: DecidePreen})
	for i := range 1000 {
		col.Report(Finding{Code: toyHigh, Place: Place{Offset: int64(1000 - i)}, Fix: &Fix{Text: "x", Level: Preen}})
		col.Report(Finding{Code: toyBad, Place: Place{Offset: int64(i)}, Fix: &Fix{Text: "x", Level: Full}})
		// A fix that loses something is not for -p, whatever its level says.
		col.Report(Finding{Code: toyNote, Fix: &Fix{Text: "x", Level: Preen, Loses: ranges(0, 1)}})
	}
	r := col.Sum(Stats{})
	if len(r.Findings) != 15 || r.More(toyBad) != 995 || r.Worst() != Damage {
		t.Errorf("%d findings, %d more, worst %v", len(r.Findings), r.More(toyBad), r.Worst())
	}
	if got := fmt.Sprint(r.Counts[0].Code, r.Counts[0].Found, r.Counts[0].Fixed, r.Counts[1].Code, r.Counts[1].Found, r.Counts[1].Fixed, r.Counts[2].Fixed); got != "toy.byte.bad 1000 0 toy.byte.high 1000 1000 0" {
		t.Error(got)
	}
	if r.Findings[0].Place.File != "f" || r.Findings[0].Code != toyBad || r.Findings[5].Place.Offset > r.Findings[6].Place.Offset {
		t.Errorf("order: %+v", r.Findings)
	}
}

func ranges(off, n int64) []blockmap.Range { return []blockmap.Range{{Off: off, Len: n}} }

// TestCodeNames holds the names that Register takes against a pattern.
func TestCodeNames(t *testing.T) {
	pattern := regexp.MustCompile(`^[a-z][a-z0-9]*(\.[a-z0-9]+(-[a-z0-9]+)*){1,3}$`)
	rng := rand.New(rand.NewPCG(1, 2))
	good := 0
	for range 200_000 {
		b := make([]byte, 1+rng.IntN(9))
		for i := range b {
			b[i] = "az09.-.A "[rng.IntN(9)]
		}
		want := pattern.Match(b)
		if wellFormed(string(b)) != want {
			t.Fatalf("%q: %v", b, !want)
		}
		if want {
			good++
		}
	}
	if good < 1000 {
		t.Errorf("only %d good ones", good)
	}
}

func TestRegister(t *testing.T) {
	for name, do := range map[string]func(){
		"twice":    func() { Register("toy.byte.bad", Note, "m", "r") },
		"name":     func() { Register("Toy.byte", Note, "m", "r") },
		"short":    func() { Register("toy", Note, "m", "r") },
		"texts":    func() { Register("toy.a.b", Note, "", "r") },
		"severity": func() { Register("toy.a.c", 0, "m", "r") },
		"checker":  func() { RegisterChecker(rawChecker{}) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", name)
				}
			}()
			do()
		}()
	}
	if _, err := CheckerFor("no such"); err == nil {
		t.Error("a checker for nothing")
	}
	r, err := CheckFile(t.Context(), backend.NewMemBytes("x", make([]byte, 100)), "raw")
	if err != nil || r.Worst() != Note {
		t.Errorf("%+v %v", r, err)
	}
}
