"""What runs models, anywhere: an archive carries this folder, and it imports nothing beside itself."""
