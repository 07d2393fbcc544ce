package cli

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

func TestRate(t *testing.T) {
	begin := time.Unix(1000, 0)
	r := rate{"moving", begin, 10 << 20}
	for _, c := range []struct {
		after time.Duration
		done  int64
		want  string
	}{
		{500 * time.Millisecond, 20 << 20, ""},
		{2 * time.Second, 10 << 20, ""},
		{2 * time.Second, 30 << 20, " 10 MiB/s 1m37s left"},
		{10 * time.Second, 1000 << 20, " 99 MiB/s"},
	} {
		if got := r.text(begin.Add(c.after), c.done, 1000<<20); got != c.want {
			t.Errorf("%d bytes after %v: %q, want %q", c.done, c.after, got, c.want)
		}
	}
}

func TestProgressOfBytes(t *testing.T) {
	var out bytes.Buffer
	p, err := NewProgress("plain", &out)
	if err != nil {
		t.Fatal(err)
	}
	for done := range int64(101) {
		p.UpdateBytes("moving", done, 100)
	}
	if got := out.String(); strings.Count(got, "\n") != 11 || !strings.HasPrefix(got, "moving: 0%\n") || !strings.HasSuffix(got, "moving: 100%\n") {
		t.Errorf("%q", got)
	}
	var none *Progress
	none.UpdateBytes("moving", 1, 2)
}
