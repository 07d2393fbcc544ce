package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fsck"
	_ "github.com/imagestack/imagestack/fsck/ploopfsck"
	_ "github.com/imagestack/imagestack/fsck/qcow2fsck"
)

// The images of the check workload are sound and as full as they say, and no
// longer sound with their damage.
func TestFsckImages(t *testing.T) {
	for name, build := range map[string]func(path string) (fsckImage, error){
		"qcow2":     func(p string) (fsckImage, error) { return mappedQcow2(p, 3<<30+64<<10, 0) },
		"snapshots": func(p string) (fsckImage, error) { return mappedQcow2(p, 2<<30, 9) },
		"ploop":     mappedPloop,
	} {
		path := filepath.Join(t.TempDir(), name)
		img, err := build(path)
		if err != nil {
			t.Fatal(err)
		}
		check := func() *fsck.Report {
			f, err := backend.Open(path, backend.Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			rep, err := fsck.CheckFile(context.Background(), f, strings.Replace(name, "snapshots", "qcow2", 1))
			if err != nil {
				t.Fatal(err)
			}
			return rep
		}
		if rep := check(); rep.Worst() > fsck.Note || rep.Stats.AllocatedClusters != img.clusters {
			t.Errorf("%s: %v, %d clusters and not %d", name, rep.Worst(), rep.Stats.AllocatedClusters, img.clusters)
		}
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.WriteAt(img.damage, img.damageAt)
		if f.Close() != nil || err != nil {
			t.Fatal(err)
		}
		if rep := check(); rep.Worst() <= fsck.Note {
			t.Errorf("%s: the damage is none", name)
		}
	}
}

func TestFsckTable(t *testing.T) {
	side := func(seconds float64, rss int64) *fsckSide {
		return &fsckSide{Peer: "peer", Samples: []fsckSample{{Seconds: seconds, RSS: rss}}}
	}
	failed := side(1, 1)
	failed.Error = "exit 11"
	d := fsckDocument{Results: []*fsckResult{
		{fsckCase: fsckCase{Name: "one"}, Sides: []*fsckSide{side(0.1, 10<<20), side(1, 41<<20), failed}},
		{fsckCase: fsckCase{Name: "two"}, Sides: []*fsckSide{side(0.1, 10<<20), side(0.2, 20<<20)}},
		{fsckCase: fsckCase{Name: "three"}, Error: "no | room"},
	}}
	var b bytes.Buffer
	if err := d.print(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"| one | peer | 0.100 | 1.000 | 10.00x (10.00–10.00) | 5x met | 10.0 | 41.0 | 0.24 | 0.25 met |",
		"| one | peer | not measured: exit 11",
		"2.00x (2.00–2.00) | 5x missed | 10.0 | 20.0 | 0.50 | 0.25 missed |",
		"| three | – | not measured: no / room",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("%q is not in\n%s", want, b.String())
		}
	}
}
