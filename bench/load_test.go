package main

import (
	"testing"
	"time"
)

func TestParseProcessStat(t *testing.T) {
	got, err := parseProcessStat("123 (a) b (c)) S 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20 0 9")
	if err != nil || got != 2*time.Second {
		t.Errorf("got %v, %v; want 2s", got, err)
	}
	for _, bad := range []string{"", "1 (x) S 1 2", "1 x S 1 2 3 4 5 6 7 8 9 10 11 12 13", "1 (x) S 1 2 3 4 5 6 7 8 9 10 y 50 0"} {
		if got, err := parseProcessStat(bad); err == nil {
			t.Errorf("%q: got %v", bad, got)
		}
	}
}

func TestParseMachineStat(t *testing.T) {
	got, err := parseMachineStat("cpu  10 20 30 400 50 6 7 8 9 9\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
	want := machineCPU{busy: 73, total: 531, steal: 8}
	if err != nil || got != want {
		t.Errorf("got %+v, %v; want %+v", got, err, want)
	}
	for _, bad := range []string{"", "cpu0 1 2 3 4 5 6 7 8", "cpu 1 2 3", "cpu 1 2 3 4 x 6 7 8"} {
		if got, err := parseMachineStat(bad); err == nil {
			t.Errorf("%q: got %+v", bad, got)
		}
	}
}

func TestParseKiB(t *testing.T) {
	const s = "VmPeak:\t 1 kB\nVmHWM:\t  27 kB\n"
	if got, err := parseKiB(s, "VmHWM:"); err != nil || got != 27<<10 {
		t.Errorf("got %v, %v", got, err)
	}
	for _, key := range []string{"VmRSS:", "HWM:"} {
		if got, err := parseKiB(s, key); err == nil {
			t.Errorf("%s: got %v", key, got)
		}
	}
	if got, err := parseKiB("A: 1 MB", "A:"); err == nil {
		t.Errorf("of another unit: got %v", got)
	}
}
