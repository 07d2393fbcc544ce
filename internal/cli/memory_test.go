package cli

import (
	"context"
	"io"
	"math"
	"runtime/debug"
	"testing"

	"github.com/alecthomas/kong"
)

func TestCacheSizeBoundsTheProcess(t *testing.T) {
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(-1))
	for arg, want := range map[string]int64{
		"": 64<<20 + workingMemory, "--cache-size=256M": 256<<20 + workingMemory, "--cache-size=8E": 0, "--cache-size=7E": 7<<60 + workingMemory,
	} {
		debug.SetMemoryLimit(math.MaxInt64)
		var flags struct{ ImageFlags }
		tool := Tool{Name: "t", Flags: &flags, Run: func(context.Context, *kong.Context) error { return nil }}
		args := []string{arg}
		if arg == "" {
			args = nil
		}
		code := tool.Execute(context.Background(), args, io.Discard, io.Discard)
		if want == 0 {
			if code != ExitUsage {
				t.Errorf("%s: exit %d", arg, code)
			}
			continue
		}
		if got := debug.SetMemoryLimit(-1); code != 0 || got != want {
			t.Errorf("%q: exit %d, limit %d, want %d", arg, code, got, want)
		}
	}
}
