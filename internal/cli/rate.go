package cli

import (
	"fmt"
	"time"

	"github.com/dustin/go-humanize"
)

// rate is how fast the step under way goes.
type rate struct {
	label string
	begin time.Time
	from  int64
}

// UpdateBytes is Update for bytes, with their rate and the time that the rest
// will take. Both are averages over the step, which begins with the first call
// that has its label.
func (p *Progress) UpdateBytes(label string, done, total int64) {
	if p == nil || total <= 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if p.rate.label != label || done < p.rate.from {
		p.rate = rate{label, now, done}
	}
	p.update(label, p.rate.text(now, done, total), done, total)
}

// text is empty as long as too little is known.
func (r rate) text(now time.Time, done, total int64) string {
	took := now.Sub(r.begin)
	if took < time.Second || done <= r.from {
		return ""
	}
	perSecond := float64(done-r.from) / took.Seconds()
	text := fmt.Sprintf(" %s/s", humanize.IBytes(uint64(perSecond)))
	if left := float64(max(total-done, 0)) / perSecond; left > 0 && left < 1000*3600 {
		d := time.Duration(left * float64(time.Second)).Round(time.Second)
		text += fmt.Sprintf(" %s left", d)
	}
	return text
}
