package main

import (
	"bufio"
	"io"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/fsck"
)

// TestAskerRemembers: a question that was answered with no is not asked again,
// and the answer is not that to another question.
func TestAskerRemembers(t *testing.T) {
	code := fsck.Codes()[0]
	finding := func(off int64, field string, value any) fsck.Finding {
		return fsck.Finding{Code: code, Place: fsck.Place{File: "x", Offset: off, Field: field, Value: value}, Fix: &fsck.Fix{Text: "mend it", Level: fsck.Full}}
	}
	asked := 0
	a := &asker{in: bufio.NewReader(strings.NewReader("n\nn\ny\n")), ctx: t.Context(), out: io.Discard, before: func() { asked++ }}
	for i, c := range []struct {
		f     fsck.Finding
		want  bool
		asked int
	}{
		{finding(512, "m_Size", 1), false, 1},
		{finding(512, "m_Size", 2), false, 1}, // changed by another fix
		{finding(-1, "Image[1]", "a.hds"), false, 2},
		{finding(-1, "Image[1]", "a.hds"), false, 2},
		{finding(-1, "Image[1]", "b.hds"), true, 3}, // has taken its number
	} {
		if got := a.decide(c.f); got != c.want || asked != c.asked {
			t.Errorf("%d: %t after %d questions, want %t after %d", i, got, asked, c.want, c.asked)
		}
	}
}
