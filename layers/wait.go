package layers

import (
	"runtime"
	"time"
)

// waitFor polls done with growing pauses: grace periods are usually over at
// once, and readers must not pay for waking anybody.
func waitFor(done func() bool) {
	for i := 0; !done(); i++ {
		if i < 16 {
			runtime.Gosched()
			continue
		}
		time.Sleep(min(time.Duration(i)*10*time.Microsecond, time.Millisecond))
	}
}
