package uring

import (
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/imagestack/imagestack/internal/imgtest"
)

// answers replies with that many bytes.
type answers int

func (n answers) Try(*Request) bool { return false }
func (n answers) Do(r *Request) {
	clear(r.Results()[:n])
	r.Reply(int(n), 0)
}

// hugeKiB is how much of the mapping that b lies in is in huge pages.
func hugeKiB(t *testing.T, b []byte) (n int) {
	t.Helper()
	maps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	var at uint64
	if _, err := fmt.Sscanf(fmt.Sprintf("%p", b), "0x%x", &at); err != nil {
		t.Fatal(err)
	}
	inside := false
	for line := range strings.Lines(string(maps)) {
		var from, to uint64
		if _, err := fmt.Sscanf(line, "%x-%x ", &from, &to); err == nil {
			inside = from <= at && at < to
		} else if inside && strings.HasPrefix(line, "AnonHugePages:") {
			if _, err := fmt.Sscanf(line, "AnonHugePages: %d kB", &n); err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatal("the mapping is not there")
	return 0
}

// TestHugePages: the memory of a place is mapped by a huge page from its first
// long request on, be it a read or a write, and not for short ones.
func TestHugePages(t *testing.T) {
	imgtest.RequireURing(t)
	imgtest.RequireHugePages(t)
	always, err := os.ReadFile("/sys/kernel/mm/transparent_hugepage/enabled")
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		name          string
		written, read int
		want          int
	}{
		{"short", 4096, 65536, 0}, {"long read", 0, 1 << 20, 2048}, {"long write", 1 << 20, 8, 2048},
	} {
		q, err := newQueue(0, 4, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			q.work(1, answers(step.read))
		}()
		p := &q.places[1]
		for i := range p.payload[:step.written] {
			p.payload[i] = byte(i)
		}
		binary.NativeEndian.PutUint32(p.header[atPayload:], uint32(step.written))
		p.wake <- struct{}{}
		close(p.wake)
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			t.Fatal("no answer")
		}
		if step.want == 0 && strings.Contains(string(always), "[always]") {
			step.want = 2048
		}
		if got := hugeKiB(t, q.data); got != step.want {
			t.Errorf("%s: %d KiB in huge pages, want %d", step.name, got, step.want)
		}
		if err := q.close(); err != nil {
			t.Error(err)
		}
	}
}
