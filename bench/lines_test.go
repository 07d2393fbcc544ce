package main

import (
	"testing"
)

func TestLines(t *testing.T) {
	entries, err := jobFiles.ReadDir("jobs")
	if err != nil {
		t.Fatal(err)
	}
	unused := map[string]bool{}
	for _, e := range entries {
		unused[e.Name()] = true
	}
	seen := map[string]bool{}
	last := map[string]int{}
	spoiled := map[string]bool{}
	for i, l := range allLines() {
		k := l.key()
		if seen[k] {
			t.Errorf("two lines have the key %s", k)
		}
		seen[k] = true
		if l.kind == kindFio {
			if _, err := jobFiles.ReadFile("jobs/" + l.job + ".fio"); err != nil {
				t.Errorf("%s: %v", k, err)
			}
			delete(unused, l.job+".fio")
		}
		if at, ok := last[l.image]; ok && at != i-1 {
			t.Errorf("%s: the lines of image %s are not together: it would be built twice", k, l.image)
		}
		last[l.image] = i
		if spoiled[l.image] && !(l.write && l.on == onImage) {
			t.Errorf("%s comes after a line that changes the content of the image", k)
		}
		if l.write && l.on == onImage {
			spoiled[l.image] = true
		}
	}
	for _, k := range quickKeys {
		if !seen[k] {
			t.Errorf("the quick run names %s, which does not exist", k)
		}
	}
	for f := range unused {
		t.Errorf("no line uses jobs/%s", f)
	}
}
