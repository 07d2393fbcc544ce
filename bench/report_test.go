package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"
)

func testResults() []*lineResult {
	sub := func(peer, img string, v ...float64) *subject {
		s := &subject{peer: peer, image: img, serve: []string{"x"}}
		for i, f := range v {
			s.samples = append(s.samples, sample{pair: i, value: f, rss: 5 << 20, result: fioResult{bytes: 1 << 30, ios: 1, seconds: 1}, serverCPU: 1e9})
		}
		return s
	}
	l := line{name: "seq", job: "seqread-1m", image: imgQcow2, goal: 4}
	broken := sub(peerQSD, imgQcow2)
	broken.err = errors.New("does | not\nstart")
	return []*lineResult{
		{line: l, subjects: []*subject{sub(peerOurs, imgQcow2, 100, 300, 90), sub(peerQSD, imgQcow2, 20, 50, 30), sub(peerBare, imgBase, 200, 200, 200)}},
		{line: line{name: "cold", job: "seqread-1m-once", image: imgQcow2, goal: 4, cold: true}, reason: "no disk"},
		{line: line{name: "rand", job: "randread-4k-qd1", image: imgQcow2, small: true, goal: 2}, subjects: []*subject{sub(peerOurs, imgQcow2, 10), broken}},
	}
}

func TestTable(t *testing.T) {
	var b bytes.Buffer
	if err := printTable(&b, testResults(), 3); err != nil {
		t.Fatal(err)
	}
	got := b.String()
	for _, want := range []string{
		"| seq | MiB/s | 100 | 30.0 | 200 | 5.00x (3.00–6.00) | 4.00x met | 0.50x (0.45–1.50) | 1.00 / 1.00 |",
		"| cold | MiB/s | – | – | – | – | 4.00x | – | – | not measured: no disk |",
		"qemu-storage-daemon not measured: does / not; start",
		"| rand | IOPS | 10.0 | – | – | – | 2.00x |",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("the table lacks\n%s\n%s", want, got)
		}
	}
}

func TestJSON(t *testing.T) {
	var b bytes.Buffer
	if err := printJSON(&b, &document{Settings: settings{Pairs: 3}}, testResults()); err != nil {
		t.Fatal(err)
	}
	var d document
	if err := json.Unmarshal(b.Bytes(), &d); err != nil {
		t.Fatal(err)
	}
	if len(d.Lines) != 3 {
		t.Fatalf("%d lines, want 3", len(d.Lines))
	}
	r := d.Lines[0].Ratios
	if len(r) != 2 || r[0].Stats != (stats{3, 5, 3, 6}) || r[0].Met == nil || !*r[0].Met || r[1].Met != nil {
		t.Errorf("ratios %+v", r)
	}
	if d.Lines[1].NotMeasured != "no disk" || d.Lines[2].Subjects[1].Error == "" || d.Lines[2].Ratios[0].Met != nil {
		t.Errorf("what was not measured: %+v", d.Lines[1:])
	}
}
