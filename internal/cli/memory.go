package cli

import (
	"math"
	"runtime/debug"

	"github.com/imagestack/imagestack/layers"
)

// workingMemory is what a tool may use besides the cache, in bytes: buffers of
// requests under way, stacks, and the garbage between two collections.
const workingMemory = 48 << 20

// AfterApply makes the budget that the user gave hold for the process and not
// only for the cache: the collector works harder, instead of letting as much
// garbage as there is cache pile up beside it.
func (f *ImageFlags) AfterApply() error {
	cache := int64(f.CacheSize)
	if cache <= 0 {
		cache = layers.DefaultCacheSize
	}
	debug.SetMemoryLimit(min(cache, math.MaxInt64-workingMemory) + workingMemory)
	return nil
}
