package qcow2

import (
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest/layertest"
)

// TestEverySyncIsNeeded is the negative control of the power-cut check.
//
// The last sync of a close makes lowered counts durable: without it there are
// leaks, which a power cut may leave.
func TestEverySyncIsNeeded(t *testing.T) {
	f := conform(CreateOptions{Version: 3, ClusterSize: 512, RefcountBits: 64})
	layertest.RunSyncs(t, f, 60, "closeEditor")
}

func TestEverySyncIsNeededWithDataFile(t *testing.T) {
	f := conform(CreateOptions{Version: 3, ClusterSize: 4096, RefcountBits: 16, DataFile: "image.data"})
	layertest.RunSyncs(t, f, 60, "closeEditor")
}
