package cli

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Progress shows how far a tool has come, on stderr. A nil *Progress shows
// nothing. Its methods may be called concurrently.
type Progress struct {
	mu    sync.Mutex
	w     io.Writer
	plain bool
	width int       // of the terminal
	shown int       // columns of the bar on the screen
	last  time.Time // of the last output
	step  map[string]int64
	rate  rate
}

// NewProgress returns what --progress mode asks for: auto (a bar on a
// terminal, else nothing), bar, plain (a line for each tenth) or none.
func NewProgress(mode string, w io.Writer) (*Progress, error) {
	p := &Progress{w: w, step: map[string]int64{}, width: 80}
	f, _ := w.(*os.File)
	if f != nil {
		if ws, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil && ws.Col > 0 {
			p.width = int(ws.Col)
		}
	}
	switch mode {
	case "", "auto":
		if f == nil || !IsTerminal(f) {
			return nil, nil
		}
	case "bar":
	case "plain":
		p.plain = true
	case "none":
		return nil, nil
	default:
		return nil, Usagef("--progress %s: want auto, bar, plain or none", mode)
	}
	return p, nil
}

// IsTerminal reports whether f is a terminal.
func IsTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// Update tells that done of total units of what label names are done. It is
// cheap enough for every unit of work that takes a millisecond.
func (p *Progress) Update(label string, done, total int64) {
	if p == nil || total <= 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.update(label, "", done, total)
}

// update shows a label with something behind it that changes.
func (p *Progress) update(label, more string, done, total int64) {
	done = max(0, min(done, total))
	if p.plain {
		step := 10 * done / total
		if old, ok := p.step[label]; !ok || step > old {
			p.step[label] = step
			fmt.Fprintf(p.w, "%s: %d%%%s\n", label, 10*step, more)
		}
		return
	}
	now := time.Now()
	if now.Sub(p.last) < 100*time.Millisecond && p.shown > 0 && done < total {
		return
	}
	p.last = now
	const bar = 30
	room := max(p.width-bar-9, 8)
	name := []rune(label + more)
	if len(name) > room {
		name = append([]rune("…"), name[len(name)-room+1:]...)
	}
	full := int(bar * done / total)
	line := fmt.Sprintf("%s [%s%s] %3d%%", string(name), strings.Repeat("#", full), strings.Repeat(" ", bar-full), 100*done/total)
	pad := max(0, p.shown-len(name)-bar-8)
	fmt.Fprintf(p.w, "\r%s%s", line, strings.Repeat(" ", pad))
	p.shown = len(name) + bar + 8
}

// Clear takes the bar away, so that other output has a clean line.
func (p *Progress) Clear() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.shown > 0 {
		fmt.Fprintf(p.w, "\r%s\r", strings.Repeat(" ", p.shown))
		p.shown = 0
	}
}
