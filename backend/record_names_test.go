package backend

import (
	"testing"
)

// TestNames: a file written to a temporary name and renamed is the old one or
// the new one, whole, when it is synced before the rename and the directory
// after it; and neither sync can be left out.
func TestNames(t *testing.T) {
	r := NewRecorder()
	old, err := r.Wrap(NewMemBytes("old", []byte("old")))
	if err != nil {
		t.Fatal(err)
	}
	dir, err := r.Names("dir", map[string]File{"file": old})
	if err != nil {
		t.Fatal(err)
	}
	temp, err := r.Wrap(NewMem("temp"))
	if err != nil {
		t.Fatal(err)
	}
	if err := dir.Link("temp", temp); err != nil {
		t.Fatal(err)
	}
	if _, err := temp.WriteAt([]byte("new"), 0); err != nil {
		t.Fatal(err)
	}
	if err := temp.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := dir.Rename("temp", "file"); err != nil {
		t.Fatal(err)
	}
	if err := dir.Sync(); err != nil {
		t.Fatal(err)
	}
	if got := dir.List(); len(got) != 1 || got[0] != "file" {
		t.Errorf("%v", got)
	}
	bad := func(ignore int) (states, bad int) {
		for s := range r.States(StateOptions{IgnoreSync: ignore}) {
			states++
			i, ok := s.Names[dir.Index()]["file"]
			if !ok {
				t.Fatalf("%s: no file", s)
			}
			switch string(s.Files[i].Bytes()) {
			case "new":
			case "old":
				if s.Completed == r.Syncs() {
					bad++
				}
			default:
				bad++
			}
		}
		return states, bad
	}
	if n, wrong := bad(0); wrong != 0 || n < 5 {
		t.Errorf("%d of %d states are wrong", wrong, n)
	}
	for i := 1; i <= 2; i++ {
		if _, wrong := bad(i); wrong == 0 {
			t.Errorf("nothing is wrong without sync %d", i)
		}
	}
	if dir.Remove("nothing") == nil || dir.Rename("nothing", "x") == nil || dir.Link("x", NewMem("foreign")) == nil {
		t.Error("what is not there can be used")
	}
}
